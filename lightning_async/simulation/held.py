"""A holder in a virtual cluster: it takes real gradients, each from a buffer of its own while it is under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.finite import all_finite
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import FlatLayout, exchanged_parameters
from lightning_async.holder.types import Push, Update
from lightning_async.policies.base import StalenessPolicy, overrides
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.health import RejectionStreaks
from lightning_async.simulation.sink import Delivery, GradientSink

__all__ = ["HolderSink", "make_holder"]


def make_holder(
    layout: FlatLayout,
    optimizer: torch.optim.Optimizer,
    barrier: StalenessBarrier,
    observer: Callable[[Update], None],
    state: StateByPlace | None,
    policy: StalenessPolicy | None = None,
    momentum_rule: Callable[[float], float] | None = None,
) -> Holder:
    """A holder of an optimizer's parameters, where they are.

    Args:
        layout: of the optimizer's parameters.
        optimizer: the module's.
        barrier: of the cluster; the holder's from here on.
        observer: called with each gradient that was taken or dropped.
        state: the optimizer's, to begin with; None if it has none.
        policy: what is done with a gradient because of its age, bound to the cluster.
        momentum_rule: what becomes of the optimizer's momentum; None if it stays.
    """
    parameters = exchanged_parameters(optimizer)
    initial = layout.buffer().to(parameters[0].device)
    for view, parameter in zip(layout.views(initial, 0), parameters, strict=True):
        view.copy_(parameter.detach())
    return Holder(layout, initial, [optimizer], barrier, FailureLatch(), observer, [state], policy, momentum_rule)


class HolderSink(GradientSink):
    """What reads and gradients come to: a holder.

    Args:
        optimizer: the module's; its parameters are the initial ones.
        barrier: of the cluster.
        observe: called with each gradient that was taken or dropped, its time being the virtual one.
        state: the optimizer's, to begin with; None if it has none.
        gathered: gradients that wait for more, from a checkpoint; None if there are none.
        policy: what is done with a gradient because of its age, bound to the cluster.
        momentum_rule: what becomes of the optimizer's momentum; None if it stays.
        learned: what the policy has learned, from a checkpoint.
        max_rejected: gradients in a row that are not finite, and rejected, with which a worker fails; None applies
            them.

    Attributes:
        holder: the holder.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        barrier: StalenessBarrier,
        observe: Callable[[Update], None],
        state: StateByPlace | None = None,
        gathered: Gathered | None = None,
        policy: StalenessPolicy | None = None,
        momentum_rule: Callable[[float], float] | None = None,
        learned: Mapping[str, Any] | None = None,
        max_rejected: int | None = None,
    ) -> None:
        self._streaks = None if max_rejected is None else RejectionStreaks(max_rejected)
        self._barrier = barrier
        self._observe = observe
        self._parameters = exchanged_parameters(optimizer)
        self._layout = FlatLayout([self._parameters])
        self.holder = make_holder(self._layout, optimizer, barrier, self._in_virtual_time, state, policy, momentum_rule)
        self._views = self._layout.views(self.holder.lend(), 0)
        # What a worker is answered with, where a policy moves it.
        moves = policy is not None and overrides(policy, "look_ahead") and barrier.max_staleness != 0
        self._answer = torch.zeros_like(self.holder.lend()) if moves else self.holder.lend()
        if gathered is not None or learned is not None:
            gathered = gathered and gathered.to(self.holder.lend().device)
            states = self.holder.snapshot().optimizer_states
            self.holder.restore(barrier.version, states, gathered, learned)
        # A buffer and its parts, for each gradient that is under way; those of before are used again.
        self._free: list[tuple[Tensor, list[Tensor]]] = []
        self._under_way: dict[int, tuple[Push, tuple[Tensor, list[Tensor]]]] = {}
        self._taken_at = 0.0

    @torch.no_grad()
    def install(self) -> None:
        """Gives the module the holder's parameters."""
        torch._foreach_copy_(self._parameters, self._views)

    @torch.no_grad()
    def install_answer(self) -> None:
        """Gives the module what the worker that has read was answered with."""
        if self._answer is not self.holder.lend():
            torch._foreach_copy_(self._parameters, self._layout.views(self._answer, 0))

    def follow(self) -> None:
        """Lets the holder take over what user code has done to the module's parameters since `install`."""
        self.holder.load_parameters([self._parameters])

    @torch.no_grad()
    def stash(self, push: Push) -> None:
        """Keeps a gradient until it arrives; its tensors are the caller's again.

        Args:
            push: the gradient.
        """
        flat, views = self._free.pop() if self._free else self._new_buffer()
        pairs = [(view, own) for view, own in zip(views, push.gradients, strict=True) if own is not None]
        torch._foreach_copy_([view for view, _ in pairs], [own for _, own in pairs])
        kept: Sequence[Tensor | None] = [
            None if own is None else view for view, own in zip(views, push.gradients, strict=True)
        ]
        finite = self._streaks is None or all_finite(flat, views, [own is not None for own in push.gradients])
        self._under_way[push.worker] = (push._replace(gradients=kept, flat=flat, finite=finite), (flat, views))

    @override
    def ask(self, worker: int) -> None:
        self.holder.expect([worker])

    @override
    def may_read(self, worker: int) -> bool:
        return self._barrier.may_read((worker, 0))

    @override
    def read(self, worker: int) -> int:
        version = self.holder.try_pull(worker, self._answer)
        assert version is not None
        return version

    @override
    def push(self, delivery: Delivery, parked: float) -> bool | None:
        push, buffer = self._under_way[delivery.worker]
        # Without the time in the holder's queue, which a real holder does not see either.
        self._taken_at = delivery.at + parked
        update = self.holder.try_push(push._replace(waited_s=delivery.waited), parked)
        if update is None:
            return None
        del self._under_way[delivery.worker]
        self._free.append(buffer)
        if self._streaks is not None and (sick := self._streaks.note(push.worker, update.rejected)) is not None:
            raise WorkerFailedError(RunFailure(sick.worker, sick.reason))
        return update.applied

    @override
    def leave(self, worker: int) -> None:
        self.holder.leave(worker)

    def _new_buffer(self) -> tuple[Tensor, list[Tensor]]:
        flat = torch.zeros_like(self.holder.lend())
        return flat, self._layout.views(flat, 0)

    def _in_virtual_time(self, update: Update) -> None:
        self._observe(dataclasses.replace(update, at_ns=round(1e9 * self._taken_at)))
