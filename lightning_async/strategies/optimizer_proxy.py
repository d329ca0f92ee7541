"""The module's optimizers as proxies: they carry hyperparameters, and their step pushes instead of updating.

The state is the holder's, and `optimizer_state.py` shows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NoReturn

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_async.exchange.engine import Engine
from lightning_async.holder.held_state import HeldState, StateElsewhere
from lightning_async.holder.layout import all_parameters, exchanged, exchanged_parameters
from lightning_async.holder.types import Snapshot

__all__ = [
    "agree_on_optimizers",
    "bare_state",
    "checkpointed_state",
    "held_state",
    "load_groups",
    "make_proxy",
    "place_in",
    "remove_proxy",
    "snapshot_parameters",
    "with_own_state",
]


def make_proxy(optimizer: Optimizer, push: Callable[[Optimizer], None], keeps_changes: Callable[[], bool]) -> None:
    """Makes ``optimizer.step`` run its closure and then ``push``, between the hooks that are registered for a step.

    The method is replaced on the instance: torch's schedulers have put one there already, and a subclass would come
    too late.

    Args:
        optimizer: the module's optimizer.
        push: pushes its gradients and installs fresh parameters.
        keeps_changes: whether what a hook does to the parameters is done to the holder's.
    """
    if isinstance(vars(optimizer).get("state"), StateElsewhere):
        # From an earlier fit, or retired in this one: what it has is on rank 0, and goes to the holder from there.
        vars(optimizer)["state"] = defaultdict(dict)
    watched: list[tuple[str, list[Tensor]]] = []

    def watch(kind: str, hooks: Mapping[int, Any]) -> None:
        watched.clear()
        if hooks and not keeps_changes():
            watched.append((kind, [parameter.detach().clone() for parameter in exchanged_parameters(optimizer)]))

    def check() -> None:
        for kind, before in watched:
            now = [parameter.detach() for parameter in exchanged_parameters(optimizer)]
            if not all(map(torch.equal, before, now)):
                _refuse_change(optimizer, kind)
        watched.clear()

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        push(self)
        watch("post", _hooks(self, "post"))
        return loss

    hooked = Optimizer.profile_hook_step(step)

    def checked(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        watch("pre", _hooks(self, "pre"))
        loss = hooked(self, *args, **kwargs)
        check()
        return loss

    proxy: Any = optimizer
    checked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # as above: torch marks the step that it wrapped
    proxy.step = MethodType(checked, optimizer)
    # Torch's schedulers warn if they step before their optimizer has. The other ranks' steps count, too.
    proxy._opt_called = True
    # Lightning would leave unscaling to a fused optimizer; what is pushed must be unscaled.
    proxy._step_supports_amp_scaling = False


def place_in(engine: Engine, optimizer: Optimizer) -> int:
    """The index of an optimizer that makes a step.

    Raises:
        MisconfigurationException: if the engine was built without it.
    """
    place = engine.place_of(optimizer)
    if place is None:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} makes a step and is none of trainer.optimizers. Assign it to "
            "trainer.optimizers where the ranks meet, for example in on_train_epoch_start."
        )
    return place


def with_own_state(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Those whose state is with them, and not with the holder."""
    return [optimizer for optimizer in optimizers if not isinstance(vars(optimizer).get("state"), HeldState)]


def remove_proxy(optimizer: Optimizer) -> None:
    """Gives an optimizer the step of its class again."""
    for name in ("step", "_step_supports_amp_scaling"):
        vars(optimizer).pop(name, None)


def _hooks(optimizer: Optimizer, kind: str) -> dict[int, Any]:
    everyones = _global_optimizer_pre_hooks if kind == "pre" else _global_optimizer_post_hooks
    own: Any = getattr(optimizer, f"_optimizer_step_{kind}_hooks")
    return {**everyones, **own}


def _refuse_change(optimizer: Optimizer, kind: str) -> NoReturn:
    names = " or ".join(getattr(hook, "__qualname__", repr(hook)) for hook in _hooks(optimizer, kind).values())
    raise MisconfigurationException(
        f"{names}, registered by register_step_{kind}_hook, changes the parameters of {type(optimizer).__name__} at "
        "each step. The holder makes the steps, and the next parameters that come from there would overwrite the "
        "change. Make it part of the optimizer itself (a subclass whose step does it, which strategy='async' steps as "
        "it is), do it where the ranks meet (on_validation_start, on_train_epoch_end), write the constraint as a "
        "parametrization of torch.nn.utils.parametrize, or use strategy='ddp'."
    )


def snapshot_parameters(
    state: dict[str, Any], module: nn.Module, engine: Engine, snapshot: Snapshot
) -> list[list[Tensor]]:
    """Replaces the parameters in a module's state dict by copies of a snapshot's, in place.

    Returns:
        For each optimizer the copies of its parameters.
    """
    saved: dict[int, Tensor] = {}
    for index in range(len(engine.optimizers)):
        views = engine.layout.views(snapshot.parameters, index)
        # A view would take the whole flat buffer into the file with it.
        saved |= {id(p): view.to(p.dtype, copy=True) for p, view in zip(engine.parameters(index), views, strict=True)}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in state and id(parameter) in saved:
            state[name] = saved[id(parameter)]
    return [[saved[id(p)] for p in engine.parameters(index)] for index in range(len(engine.optimizers))]


def checkpointed_state(optimizer: Optimizer, engine: Engine, snapshot: Snapshot) -> dict[str, Any]:
    """An optimizer's state dict for a checkpoint: the holder's state, the proxy's groups.

    The groups are the proxy's because schedulers keep their notes in them (``initial_lr``), and because the holder's
    choice of kernel is no one else's affair. What the holder's steps have changed in its groups goes in, too. Where
    the ranks meet, a state that user code has looked at is its own: it may have been changed.
    """
    index = engine.place_of(optimizer)
    if index is None:
        return optimizer.state_dict()
    held = snapshot.optimizer_states[index]
    with engine.states.show(index, held["state"]):
        shown = optimizer.state_dict()
    more = {key: value for key, value in held.items() if key not in ("state", "param_groups")}
    adapted: Sequence[Mapping[str, Any]] = snapshot.adapted[index]
    # Groups that were added since are not the holder's yet.
    behind: list[Mapping[str, Any]] = [{}] * (len(shown["param_groups"]) - len(adapted))
    groups = zip(shown["param_groups"], [*adapted, *behind], strict=True)
    # A wrapper around another optimizer has no state of its own to show.
    return (
        shown
        | more
        | {
            "state": shown["state"] or held["state"],
            "param_groups": [group | changed for group, changed in groups],
        }
    )


def bare_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict without what it keeps for its parameters, which is not fetched for it."""
    shown = vars(optimizer).get("state")
    if not isinstance(shown, HeldState):
        return optimizer.state_dict()
    with shown.lend({}):
        return optimizer.state_dict()


def held_state(optimizer: Optimizer, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpointed state dict as the holder's optimizer takes it, which lacks the parameters that do not travel."""
    parameters = all_parameters(optimizer)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if all(map(exchanged, parameters)) or len(numbers) != len(parameters):
        # What does not fit is left for torch to refuse.
        return state
    held = [number for number, parameter in zip(numbers, parameters, strict=True) if exchanged(parameter)]
    places = {number: place for place, number in enumerate(held)}
    return {
        **state,
        "state": {
            places.get(key, key): value for key, value in state["state"].items() if key not in {*numbers} - {*held}
        },
        "param_groups": [
            {**group, "params": [places[number] for number in group["params"] if number in places]}
            for group in state["param_groups"]
        ],
    }


def agree_on_optimizers(
    optimizers: Sequence[Optimizer], engine: Engine, gather: Callable[[list[Any]], list[list[Any]]]
) -> None:
    """Checks that user code has left all ranks with the same optimizers; a collective call.

    Args:
        optimizers: this rank's.
        engine: this rank's, which knows what it was built for.
        gather: gives every rank's object.

    Raises:
        MisconfigurationException: if they differ, on every rank.
    """
    mine = [
        (
            type(optimizer).__name__,
            [len(group["params"]) for group in optimizer.param_groups],
            engine.place_of(optimizer),
        )
        for optimizer in optimizers
    ]
    everyones = gather(mine)
    other = next((rank for rank, theirs in enumerate(everyones) if theirs != everyones[0]), None)
    if other is not None:
        raise MisconfigurationException(
            f"rank {other} now has the optimizers {_describe(everyones[other])}, and rank 0 {_describe(everyones[0])}. "
            "Every rank must replace an optimizer, or add a param group, at the same place: leave out conditions such "
            "as `if trainer.is_global_zero` around it."
        )


def _describe(optimizers: list[Any]) -> str:
    described = [
        f"{kind} (parameters per group: {', '.join(map(str, sizes))}; {'new' if place is None else 'as before'})"
        for kind, sizes, place in optimizers
    ]
    return " and ".join(described) or "none"


def load_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads the hyperparameters of a checkpointed state dict, and none of its state."""
    had_amsgrad = [group.get("amsgrad", False) for group in optimizer.param_groups]
    optimizer.load_state_dict({**state, "state": {}})
    for group, had in zip(optimizer.param_groups, had_amsgrad, strict=True):
        # The checkpoint may be from Adam without it; the holder goes on with it.
        if had:
            group["amsgrad"] = True
