"""What serves the workers, put together: holder, ledger and server.

It is in rank 0's process, or in one of its own (`remote_service.py`), where the same class does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_async.data.ledger import Ledger
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.server import Server
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout, exchanged_parameters
from lightning_async.holder.optimizer_state import StateByPlace
from lightning_async.holder.placement import HolderPlacement
from lightning_async.holder.staleness import StalenessBarrier, resolve_max_staleness
from lightning_async.holder.types import Snapshot, Update
from lightning_async.runtime.failure import FailureLatch
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.listener import Listener
from lightning_async.transport.base import Channel

__all__ = ["HolderService", "HolderSpec", "Origins", "Service", "UpdateObserver", "parameters_of"]

UpdateObserver = Callable[[Update, tuple[int, ...]], None]

# For each parameter of each optimizer its place (optimizer, position) in what was held before; None for a new one.
Origins: TypeAlias = Sequence[Sequence[tuple[int, int] | None]]


@dataclass(frozen=True, slots=True)
class HolderSpec:
    """What is to be spec, and how.

    Args:
        optimizers: to stand in for; their parameters are the initial ones.
        options: how gradients are exchanged.
        world_size: number of ranks.
        version: the version to start from.
        origins: where parameters come from that another service has spec, which this one takes the place of.
        states: for each optimizer the state to begin with; None for what its parameters had in that service.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    options: ExchangeOptions
    world_size: int
    version: int
    origins: Origins | None = None
    states: Sequence[StateByPlace | None] = ()


class Service(Protocol):
    """What rank 0 asks of whoever holds, while no worker computes unless it is said otherwise."""

    @property
    def address(self) -> Address | None:
        """Where workers come in; None if rank 0 is alone."""

    def begin_epoch(self, tickets: range, block: int = 1, applied: Iterable[tuple[int, int]] = ()) -> None:
        """See `Ledger.begin_epoch`."""

    def regroup(self, block: int, equal_shares: bool) -> None:
        """See `Ledger.regroup`."""

    def open(self, tickets: int) -> None:
        """See `Ledger.open`."""

    def progress(self) -> tuple[int, int]:
        """See `Ledger.progress`; at any time."""

    def unfinished(self) -> int:
        """Number of tickets of this epoch that are not applied; at any time."""

    def settle(self) -> None:
        """Returns when all updates that were answered have been told; at any time."""

    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        """See `Holder.load_parameters`."""

    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        """See `Holder.load_states`."""

    def optimizer_state(self, index: int) -> StateByPlace:
        """See `Holder.optimizer_state`; at any time."""

    def take_adapted(self) -> list[list[dict[str, Any]]]:
        """See `Holder.take_adapted`."""

    def snapshot(self) -> Snapshot:
        """Parameters, optimizer states and applied tickets of one version; at any time."""

    def restore(self, version: int, optimizer_states: Sequence[Mapping[str, Any]]) -> bool:
        """See `Holder.restore`."""

    def set_counts(self, counts: Sequence[int]) -> None:
        """Sets what all workers have counted so far."""

    def close(self) -> None:
        """Waits until all workers have said goodbye, a few seconds at most, and serves nobody any more."""


class HolderService:
    """Holder, ledger and server in this process.

    Args:
        spec: what is spec.
        latch: the run's failure latch.
        listener: where workers come in; None if rank 0 is alone.
        on_update: called under the holder's lock with each update and the tickets that it covers; must be quick.
        on_refused: called when a connection or a request is refused.
        placement: where the holder lives; this host by default.
        predecessor: what this one takes the place of; closed.
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
    ) -> None:
        placement = placement or HolderPlacement()
        options, owned = spec.options, parameters_of(spec.optimizers)
        self._on_update = on_update
        self._listener = listener
        self.layout = layout = FlatLayout(owned)
        self.ledger: Ledger = Ledger(spec.world_size, options.batches) if predecessor is None else predecessor.ledger
        initial = layout.buffer()
        for index, parameters in enumerate(owned):
            for view, parameter in zip(layout.views(initial, index), parameters, strict=True):
                view.copy_(parameter.detach())
        bound = resolve_max_staleness(options.max_staleness, spec.world_size)
        barrier = StalenessBarrier(bound, options.on_stale, version=spec.version)
        self.holder = placement.make_holder(
            layout, initial.to(placement.device), spec.optimizers, barrier, latch, self._complete, states=spec.states
        )
        if predecessor is not None and spec.origins is not None:
            self._inherit(predecessor, spec.origins, spec.states)
        self._workers = spec.world_size
        self._server = Server(
            self.holder,
            self.ledger,
            layout,
            [HyperparamLayout(optimizer) for optimizer in spec.optimizers],
            latch,
            listener,
            options.transport,
            on_refused=on_refused,
            wire=(options.wire_dtype, options.parameter_wire_dtype),
            placement=placement,
            workers=spec.world_size,
            slots=options.slots(spec.world_size),
        )

    @property
    def address(self) -> Address | None:
        """See `Service.address`."""
        return None if self._listener is None else self._listener.address

    def begin_epoch(self, tickets: range, block: int = 1, applied: Iterable[tuple[int, int]] = ()) -> None:
        """See `Ledger.begin_epoch`."""
        self.ledger.begin_epoch(tickets, block, applied)

    def regroup(self, block: int, equal_shares: bool) -> None:
        """See `Ledger.regroup`."""
        self.ledger.regroup(block, equal_shares)

    def open(self, tickets: int) -> None:
        """See `Ledger.open`."""
        self.ledger.open(tickets)

    def progress(self) -> tuple[int, int]:
        """See `Ledger.progress`."""
        return self.ledger.progress()

    def unfinished(self) -> int:
        """See `Service.unfinished`."""
        return self.ledger.progress()[1] + sum(map(self.ledger.leased, range(self._workers)))

    def settle(self) -> None:
        """See `Service.settle`: they are told as they are made."""

    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        """See `Holder.load_parameters`."""
        self.holder.load_parameters(parameters)

    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        """See `Holder.load_states`."""
        self.holder.load_states(states)

    def optimizer_state(self, index: int) -> StateByPlace:
        """See `Holder.optimizer_state`."""
        return self.holder.optimizer_state(index)

    def take_adapted(self) -> list[list[dict[str, Any]]]:
        """See `Holder.take_adapted`."""
        return self.holder.take_adapted()

    def snapshot(self) -> Snapshot:
        """See `Service.snapshot`."""
        return self.holder.snapshot(self.ledger.applied)

    def restore(self, version: int, optimizer_states: Sequence[Mapping[str, Any]]) -> bool:
        """See `Holder.restore`."""
        return self.holder.restore(version, optimizer_states)

    def set_counts(self, counts: Sequence[int]) -> None:
        """See `Service.set_counts`."""
        self.holder.counts = tuple(counts)

    def local_channel(self, alone: bool) -> Channel:
        """The channel of the worker in this process; see `Server.local_channel`."""
        return self._server.local_channel(alone=alone)

    def close(self) -> None:
        """See `Service.close`."""
        self._server.close()

    def _complete(self, update: Update) -> None:
        self._on_update(update, self.ledger.complete(update.push.worker, update.push.tickets))

    def _inherit(self, predecessor: HolderService, origins: Origins, states: Sequence[StateByPlace | None]) -> None:
        """Gives the holder what the predecessor's has made of the parameters that it had."""
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
        self.holder.restore(before.version, mine.optimizer_states)
        self.holder.load_parameters(values)


def parameters_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[Tensor]]:
    """Each optimizer's parameters that travel, in the order of its groups."""
    return [exchanged_parameters(optimizer) for optimizer in optimizers]
