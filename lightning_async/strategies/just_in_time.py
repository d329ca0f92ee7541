"""A run's snapshot brought up to the moment when rank 0 was lost, by what the holder's process has left.

The snapshot has what Lightning and user code need, of the same segment of training; parameters, optimizer states,
counts and applied batches are the holder's last ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from lightning_async.exchange.last_state import LastState
from lightning_async.holder.layout import all_parameters, exchanged
from lightning_async.holder.tally import STEPS

__all__ = ["CHECKPOINT_KEY", "bring_up_to_date", "places_in_checkpoint"]

# One key for all strategies of this package: their checkpoints load in each other.
CHECKPOINT_KEY = "async_amsgrad"

Place = tuple[int, list[str]]


def places_in_checkpoint(module: LightningModule, optimizers: Sequence[Optimizer]) -> list[list[Place]]:
    """Where a checkpoint has what the holder holds.

    Args:
        module: the module.
        optimizers: its optimizers.

    Returns:
        For each optimizer, and each parameter that it shares, the parameter's number in the optimizer's state dict and
        its names in the module's.

    Examples:
        >>> import torch
        >>> module = LightningModule()
        >>> module.layer = torch.nn.Linear(1, 1)
        >>> places_in_checkpoint(module, [torch.optim.SGD(module.parameters())])
        [[(0, ['layer.weight']), (1, ['layer.bias'])]]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        [
            (number, names.get(id(parameter), []))
            for number, parameter in enumerate(all_parameters(optimizer))
            if exchanged(parameter)
        ]
        for optimizer in optimizers
    ]


def bring_up_to_date(
    checkpoint: dict[str, Any], last: LastState, places: Sequence[Sequence[Place]], counts_steps: bool
) -> None:
    """Puts what a holder had last into a checkpoint of the same segment, in place.

    Args:
        checkpoint: a snapshot of the run.
        last: what the holder had.
        places: where it goes; see `places_in_checkpoint`.
        counts_steps: whether the shared clock goes by what was counted, and not by the version.
    """
    state_dict = checkpoint["state_dict"]
    for of_one, values in zip(places, last.parameters, strict=True):
        for (_, names), value in zip(of_one, values, strict=True):
            for name in names:
                if name in state_dict:
                    state_dict[name] = value.to(state_dict[name].dtype)
    for index, held in enumerate(last.optimizer_states):
        checkpoint["optimizer_states"][index] = _state(
            checkpoint["optimizer_states"][index], held, [number for number, _ in places[index]], last.adapted[index]
        )
    noted = checkpoint[CHECKPOINT_KEY]
    noted |= {"version": last.version, "counts": [*last.counts] or noted["counts"], "policy": last.policy}
    noted["applied"] = [bound for pair in last.applied for bound in pair]
    noted.pop("gathered", None)
    if last.gathered is not None:
        noted["gathered"] = last.gathered
    steps = last.counts[STEPS] if counts_steps and last.counts else last.version
    checkpoint["global_step"] = int(steps) // int(noted["world_size"])


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
