"""A run's snapshot brought up to the moment when rank 0 was lost, by what the holder's process has left.

The snapshot has what Lightning and user code need, of the same segment of training; parameters, optimizer states,
counts and applied batches are the holder's last ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_async.exchange.last_state import LastState
from lightning_async.holder.layout import all_parameters, exchanged
from lightning_async.strategies.clock import step_at
from lightning_async.strategies.resume import EpochPlace

__all__ = ["bring_up_to_date", "places_in"]


def places_in(
    checkpoint: Mapping[str, Any], parameters: Sequence[Sequence[Tensor]], optimizers: Sequence[Optimizer]
) -> dict[str, Any]:
    """Where a checkpoint has what the holder holds.

    Args:
        checkpoint: with all that callbacks and hooks have done to it: averages in the place of parameters, say.
        parameters: for each optimizer the tensors that stand for its parameters there.
        optimizers: the optimizers.

    Returns:
        ``parameters``: for each of them the ways to where it is, as keys; none where a hook has put something else
        there. ``numbers``: for each optimizer the numbers of its parameters in its state dict.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> places_in({"state_dict": {"w": weight}}, [[weight]], [torch.optim.SGD([weight])])
        {'parameters': [[[('state_dict', 'w')]]], 'numbers': [[0]]}
    """
    found: dict[int, list[tuple[Any, ...]]] = {}
    for way, tensor in _tensors(checkpoint, ()):
        found.setdefault(id(tensor), []).append(way)
    return {
        "parameters": [[found.get(id(tensor), []) for tensor in of_one] for of_one in parameters],
        "numbers": [
            [number for number, parameter in enumerate(all_parameters(optimizer)) if exchanged(parameter)]
            for optimizer in optimizers
        ],
    }


def bring_up_to_date(
    checkpoint: dict[str, Any],
    noted: dict[str, Any],
    last: LastState,
    places: Mapping[str, Any],
    counts_steps: bool,
) -> None:
    """Puts what a holder had last into a checkpoint of the same segment, in place.

    Args:
        checkpoint: a snapshot of the run.
        noted: what it has under `CHECKPOINT_KEY`.
        last: what the holder had.
        places: where it goes; see `places_in`.
        counts_steps: whether the shared clock goes by what was counted, and not by the version.

    Raises:
        ValueError: if a hook of user code has left a parameter out of the checkpoint, or changed it.
    """
    for ways_of_one, values in zip(places["parameters"], last.parameters, strict=True):
        for ways, value in zip(ways_of_one, values, strict=True):
            if not ways:
                raise ValueError("on_save_checkpoint, or state_dict, has put something else in the parameters' place")
            for *way, name in ways:
                there = checkpoint
                for key in way:
                    there = there[key]
                there[name] = value.to(there[name].dtype)
    for index, held in enumerate(last.optimizer_states):
        checkpoint["optimizer_states"][index] = _state(
            checkpoint["optimizer_states"][index], held, places["numbers"][index], last.adapted[index]
        )
    noted |= {"version": last.version, "counts": [*last.counts], "policy": last.policy}
    noted |= replace(EpochPlace.load(noted), applied=last.applied).state()
    noted.pop("gathered", None)
    if last.gathered is not None:
        noted["gathered"] = last.gathered
    checkpoint["global_step"] = step_at(last.version, last.counts, counts_steps, noted["world_size"])


def _tensors(value: Any, way: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in nested dicts and lists, with the keys that lead to each."""
    if isinstance(value, Tensor):
        yield way, value
    elif isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(each, (*way, key))


def _state(
    saved: Mapping[str, Any], held: Mapping[str, Any], numbers: Sequence[int], adapted: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """An optimizer's state dict with the holder's state; see `checkpointed_state`."""
    more = {key: value for key, value in held.items() if key not in ("state", "param_groups")}
    own = {
        numbers[key] if isinstance(key, int) and key < len(numbers) else key: value
        for key, value in held["state"].items()
    }
    groups = [{**group, **changed} for group, changed in zip(saved["param_groups"], adapted, strict=True)]
    return {**saved, **more, "state": saved["state"] | own, "param_groups": groups}
