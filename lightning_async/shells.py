"""The module's optimizers as shells: they carry hyper-parameters, and their step pushes instead of updating.

The state is the holder's. Below `strategy.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.holder import Snapshot
from lightning_async.layout import FlatLayout

__all__ = ["checkpointed_state", "load_groups", "load_state", "make_shell", "snapshot_parameters"]


def make_shell(optimizer: Optimizer, push: Callable[[], None]) -> None:
    """Makes ``optimizer.step`` run its closure and then ``push``.

    The method is replaced on the instance: torch's schedulers have put one there already, and a subclass would come
    too late.
    """

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        push()
        return loss

    shell: Any = optimizer
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # as above: torch marks the step that it wrapped
    shell.step = MethodType(step, optimizer)
    # Torch's schedulers warn if they step before their optimizer has. The other ranks' steps count, too.
    shell._opt_called = True
    # Lightning would leave unscaling to a fused optimizer; what is pushed must be unscaled.
    shell._step_supports_amp_scaling = False


def snapshot_parameters(
    state: dict[str, Any],
    module: nn.Module,
    optimizers: list[Optimizer],
    layout: FlatLayout,
    snapshot: Snapshot,
) -> None:
    """Replaces the parameters in a module's state dict by those of a snapshot, in place."""
    saved: dict[int, Tensor] = {}
    for index, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        views = layout.views(snapshot.parameters, index)
        # A view would take the whole flat buffer into the file with it.
        saved |= {id(p): view.to(p.dtype, copy=True) for p, view in zip(parameters, views, strict=True)}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in state and id(parameter) in saved:
            state[name] = saved[id(parameter)]


def checkpointed_state(optimizer: Optimizer, snapshot: Snapshot, index: int) -> dict[str, Any]:
    """An optimizer's state dict for a checkpoint: the holder's state, the shell's groups.

    The groups are the shell's because schedulers keep their notes in them (``initial_lr``), and because the holder's
    choice of kernel is no one else's affair. What the holder's steps have changed in its groups goes in, too.
    """
    groups = zip(optimizer.state_dict()["param_groups"], snapshot.adapted[index], strict=True)
    return {**snapshot.optimizer_states[index], "param_groups": [group | adapted for group, adapted in groups]}


def load_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads the hyper-parameters of a checkpointed state dict, and none of its state."""
    had_amsgrad = [group.get("amsgrad", False) for group in optimizer.param_groups]
    optimizer.load_state_dict({**state, "state": {}})
    for group, had in zip(optimizer.param_groups, had_amsgrad, strict=True):
        # The checkpoint may be from Adam without it; the holder goes on with it.
        if had:
            group["amsgrad"] = True


def load_state(optimizer: Optimizer, snapshot: Snapshot, index: int) -> None:
    """Gives the shell the holder's state, for the time after fit."""
    optimizer.load_state_dict(checkpointed_state(optimizer, snapshot, index))
