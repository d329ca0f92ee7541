"""Where a holder with shards lives: rank 0's process and one for each further shard, on rank 0's host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.shared_payload import SharedPayload
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.placement import HolderPlacement
from lightning_async.holder.types import Update
from lightning_async.policies.base import StalenessPolicy
from lightning_async.runtime.failure import FailureLatch
from lightning_async.shards.followers import FollowerLink, Followers, Report
from lightning_async.shards.operations import Serve, ShardSpec
from lightning_async.shards.plan import ShardPlan, plan_shards
from lightning_async.shards.sequencer import SequencingHolder
from lightning_async.shards.template import (
    attributes_of_pieces,
    check_can_be_cut,
    check_policy_can_be_cut,
    cuts_parameters,
)
from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.message import Message
from lightning_async.transport.shm import SharedSegment

__all__ = ["FollowerProcess", "ShardedPlacement", "spec_of"]


class FollowerProcess(Protocol):
    """A process that has a shard, as the placement sees it."""

    def watch(self, latch: FailureLatch, timeout_s: float) -> None:
        """Waits until it can be told something; from here on its loss is a failure. Idempotent."""

    def open(self, report: Report) -> FollowerLink:
        """A link to a new follower in it."""


class ShardedPlacement(HolderPlacement):
    """Puts a holder's first shard here, and the others into processes; one holder's.

    Args:
        processes: for the shards 1, 2, ...; a small model leaves some without one.
        options: how gradients are exchanged.
        workers: number of ranks.
    """

    def __init__(self, processes: Sequence[FollowerProcess], options: ExchangeOptions, workers: int) -> None:
        super().__init__()
        self._processes = processes
        self._options = options
        self._workers = workers
        self.needs_memory = f"holder_shards={1 + len(processes)}"
        self._holder: SequencingHolder | None = None
        # The parameters of rank 0's own worker, whose thread serves itself.
        self._local: Tensor | None = None

    @override
    def make_holder(
        self,
        layout: FlatLayout,
        parameters: Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        barrier: StalenessBarrier,
        latch: FailureLatch,
        observer: Callable[[Update], None] = lambda update: None,
        states: Sequence[StateByPlace | None] = (),
        policy: StalenessPolicy | None = None,
        momentum_rule: Callable[[float], float] | None = None,
        threads: int = 1,
    ) -> Holder:
        assert threads == 1
        policy = policy or StalenessPolicy()
        check_can_be_cut(optimizers)
        check_policy_can_be_cut(policy)
        (optimizer,) = optimizers
        plan = plan_shards(layout.shapes[0], 1 + len(self._processes), cuts_parameters(optimizer))
        if plan.count == 1:
            return Holder(layout, parameters, optimizers, barrier, latch, observer, states, policy, momentum_rule)
        state = states[0] if states else None
        for process in self._processes:
            process.watch(latch, self._options.worker_timeout_s)
        followers = Followers([process.open for process in self._processes[: plan.count - 1]], latch)
        with ExitStack() as payloads:
            specs = [
                payloads.enter_context(
                    SharedPayload(
                        spec_of(
                            plan, shard, parameters, optimizer, barrier, policy, state, self._options, self._workers
                        )
                    )
                )
                for shard in range(1, plan.count)
            ]
            followers.wait(followers.tell(*(Serve(spec.address) for spec in specs)))
        self._holder = SequencingHolder(
            plan, followers, parameters, optimizer, barrier, latch, observer, state, policy, momentum_rule
        )
        return self._holder

    @override
    def attach(self, worker: int, slot: int, segment: SharedSegment) -> None:
        if self._holder is not None:
            self._holder.attach(worker, slot, segment.address, segment.buffers)

    @override
    def buffers(self, numel: int, dtype: torch.dtype) -> Buffers:
        """Buffers of rank 0's own worker, which all shards see."""
        if self._holder is None:
            return super().buffers(numel, dtype)
        segment = SharedSegment(numel, dtype)
        try:
            self._holder.attach(0, 0, segment.address, segment.buffers)
        finally:
            segment.release()
        self._local = segment.buffers.parameters
        return segment.buffers

    @override
    def deliver(self, channel: Channel, message: Message, parameters: Tensor) -> None:
        if self._holder is None:
            super().deliver(channel, message, parameters)
        elif parameters is self._local:
            self._holder.wait_until_copied(parameters)
            channel.send(message, parameters)
        else:
            self._holder.send_when_copied(parameters, channel, message)


def spec_of(
    plan: ShardPlan,
    shard: int,
    parameters: Tensor,
    optimizer: torch.optim.Optimizer,
    barrier: StalenessBarrier,
    policy: StalenessPolicy,
    state: StateByPlace | None,
    options: ExchangeOptions,
    workers: int,
) -> ShardSpec:
    """What a follower is to hold.

    Args:
        plan: who holds what.
        shard: the follower's.
        parameters: initial values of the whole vector.
        optimizer: the optimizer to stand in for.
        barrier: the sequencing holder's.
        policy: what is done with a gradient because of its age, bound to the run.
        state: what the optimizer keeps to begin with; None for what it has.
        options: how gradients are exchanged.
        workers: number of ranks.
    """
    cut: dict[int, Any] | None = None if state is None else plan.cut_state(state, shard, copies=True)
    return ShardSpec(
        shard,
        type(optimizer),
        attributes_of_pieces(optimizer, plan, shard),
        parameters[plan.part(shard)].clone(),
        plan.part(shard),
        plan.numel,
        [piece.parameter for piece in plan.pieces(shard)],
        cut,
        barrier.max_staleness,
        barrier.on_stale,
        barrier.version,
        barrier.gradients_per_update,
        policy,
        options.momentum_correction,
        workers,
        torch.get_default_dtype(),
    )
