"""What serves the workers, put together in one process: holder, ledger and server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_async.data.ledger import Batches, Ledger
from lightning_async.exchange.dial import policy_and_momentum
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.server import OnLost, Server
from lightning_async.exchange.service import HolderSpec, Origins, Service, UpdateObserver, parameters_of
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.placement import HolderPlacement
from lightning_async.holder.staleness import resolve_max_staleness
from lightning_async.holder.types import Snapshot, Update
from lightning_async.runtime.failure import FailureLatch
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.health import RejectionStreaks
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.step_watch import StepWatch
from lightning_async.transport.base import Channel

__all__ = ["HolderService"]


class HolderService(Service):
    """Holder, ledger and server in this process.

    Args:
        spec: what is held.
        latch: the run's failure latch.
        listener: where workers come in; None if rank 0 is alone.
        on_update: called under the holder's lock with each update and the tickets that it covers; must be quick.
        on_refused: called when a connection or a request is refused.
        placement: where the holder lives; this host by default.
        predecessor: what this one takes the place of; closed.
        on_lost: told which worker's connection was lost, and how; None where that ends the run.
    """

    def __init__(
        self,
        spec: HolderSpec,
        latch: FailureLatch,
        listener: Listener | None,
        on_update: UpdateObserver,
        on_refused: Callable[[], None],
        placement: HolderPlacement | None = None,
        predecessor: HolderService | None = None,
        on_lost: OnLost | None = None,
    ) -> None:
        placement = placement or HolderPlacement()
        options, owned = spec.options, parameters_of(spec.optimizers)
        self._on_update = on_update
        self._listener = listener
        self.layout = layout = FlatLayout(owned)
        self._optimizers, self._workers = spec.optimizers, spec.world_size
        bound = self._follow(options)
        batches = self._batches(options)
        self.ledger: Ledger = Ledger(spec.world_size, batches) if predecessor is None else predecessor.ledger
        initial = layout.buffer()
        for index, parameters in enumerate(owned):
            for view, parameter in zip(layout.views(initial, index), parameters, strict=True):
                view.copy_(parameter.detach())
        barrier = StalenessBarrier(bound, options.on_stale, spec.version, options.gradients_per_update)
        policy, rule = policy_and_momentum(options, spec.optimizers, spec.world_size)
        self.holder = placement.make_holder(
            layout,
            initial.to(placement.device),
            spec.optimizers,
            barrier,
            latch,
            self._complete,
            states=spec.states,
            policy=policy,
            momentum_rule=rule,
            threads=1 if options.holder_threads == "auto" else options.holder_threads,
        )
        if predecessor is not None and spec.origins is not None:
            self._inherit(predecessor, spec.origins, spec.states)
        self._workers = spec.world_size
        self._streaks = RejectionStreaks(options.max_rejected_in_a_row)
        self._server: Server = Server(
            self.holder,
            self.ledger,
            layout,
            [HyperparamLayout(optimizer) for optimizer in spec.optimizers],
            latch,
            listener,
            options.transport,
            on_refused=on_refused,
            on_lost=on_lost,
            wire=(options.wire_dtype, options.parameter_wire_dtype),
            placement=placement,
            workers=spec.world_size,
            slots=options.slots(spec.world_size),
            predecessor=None if predecessor is None else predecessor._server,
            steps=StepWatch(options.step_timeout_s, options.max_slowdown) if options.watches_steps else None,
        )

    @property
    @override
    def address(self) -> Address | None:
        return None if self._listener is None else self._listener.address

    @override
    def begin_epoch(self, tickets: range, block: int = 1, applied: Iterable[tuple[int, int]] = ()) -> None:
        self.ledger.begin_epoch(tickets, block, applied)

    @override
    def evict(self, worker: int) -> int:
        self._streaks.forget(worker)
        return self._server.evict(worker)

    @override
    def let_in(self, worker: int) -> None:
        self._server.let_in(worker)

    @override
    def admit(self, worker: int) -> None:
        self.ledger.admit(worker)

    @override
    def regroup(self, block: int, equal_shares: bool) -> None:
        self.ledger.regroup(block, equal_shares)

    @override
    def open(self, tickets: int, ranks: Sequence[int] | None = None) -> None:
        self.ledger.open(tickets)
        if self._in_lock_step:
            self.holder.expect(range(self._workers) if ranks is None else ranks)

    @override
    def progress(self) -> tuple[int, int]:
        return self.ledger.progress()

    @override
    def unfinished(self) -> int:
        return self.ledger.unfinished()

    @override
    def settle(self) -> None:
        # They are told as they are made.
        return

    @override
    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        self.holder.load_parameters(parameters)

    @override
    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        self.holder.load_states(states)

    @override
    def optimizer_state(self, index: int) -> StateByPlace:
        return self.holder.optimizer_state(index)

    @override
    def take_adapted(self) -> list[list[dict[str, Any]]]:
        return self.holder.take_adapted()

    @override
    def snapshot(self) -> Snapshot:
        return self.holder.snapshot(self.ledger.applied)

    @override
    def complete_version(self) -> bool:
        return self.holder.complete_version()

    @override
    def restore(
        self,
        version: int,
        optimizer_states: Sequence[Mapping[str, Any]],
        gathered: Gathered | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> bool:
        return self.holder.restore(version, optimizer_states, gathered, policy)

    @override
    def adjust(self, options: ExchangeOptions) -> None:
        policy, rule = policy_and_momentum(options, self._optimizers, self._workers)
        bound = self._follow(options)
        self.holder.adjust(bound, options.on_stale, options.gradients_per_update, policy, rule)
        self.ledger.deal(self._batches(options))

    def _follow(self, options: ExchangeOptions) -> int | None:
        """Notes whether the ranks go in lock step; returns the bound."""
        bound = resolve_max_staleness(options.max_staleness, self._workers, options.gradients_per_update)
        every_rank = options.gradients_per_update == self._workers > 1
        self._in_lock_step = every_rank and bound == 0 and options.on_stale == "wait"
        return bound

    def _batches(self, options: ExchangeOptions) -> Batches:
        # As under DDP each version has one gradient of each rank: there is nothing to share, and none is overtaken.
        return "sharded" if self._in_lock_step else options.batches

    @override
    def set_counts(self, counts: Sequence[int]) -> None:
        self.holder.counts = tuple(counts)

    def local_channel(self, alone: bool) -> Channel:
        """The channel of the worker in this process; see `Server.local_channel`."""
        return self._server.local_channel(alone=alone)

    @override
    def close(self) -> None:
        self._server.close()
        self.holder.close()

    def _complete(self, update: Update) -> None:
        self._on_update(update, self.ledger.complete(update.push.worker, update.push.tickets))
        if (sick := self._streaks.note(update.push.worker, update.rejected)) is not None:
            self._server.on_sick(sick)

    def _inherit(self, predecessor: HolderService, origins: Origins, states: Sequence[StateByPlace | None]) -> None:
        """Gives the holder what the predecessor's has made of the parameters that it had."""
        # Gradients that wait for more are of the parameters and the optimizer that were there.
        predecessor.holder.complete_version()
        before, mine = predecessor.holder.snapshot(), self.holder.snapshot()
        values = [self.layout.views(mine.parameters, index) for index in range(len(origins))]
        known = [predecessor.layout.views(before.parameters, index) for index in range(len(before.optimizer_states))]
        for index, (state, of_one) in enumerate(zip(mine.optimizer_states, origins, strict=True)):
            begins_anew = index < len(states) and states[index] is not None
            if not begins_anew:
                state["state"] = {}
            for position, origin in enumerate(of_one):
                if origin is None:
                    continue
                values[index][position] = known[origin[0]][origin[1]]
                former = before.optimizer_states[origin[0]]["state"]
                if origin[1] in former and not begins_anew:
                    state["state"][position] = former[origin[1]]
        self.holder.restore(before.version, mine.optimizer_states, policy=before.policy)
        self.holder.load_parameters(values)
