"""This rank's part of the exchange, put together: a worker on every rank, and on rank 0 what serves them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.exchange.local_service import HolderService
from lightning_async.exchange.negotiation import WorkerWires, dial, transport_of
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.remote_service import HolderProcess
from lightning_async.exchange.server import OnLost
from lightning_async.exchange.service import HolderSpec, Origins, Service, UpdateObserver, parameters_of
from lightning_async.exchange.state_transfer import fetch_state
from lightning_async.exchange.worker import Worker
from lightning_async.holder.held_state import OptimizerStateError, StateByPlace
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.optimizer_state import OptimizerStates, state_by_place
from lightning_async.holder.placement import HolderPlacement
from lightning_async.holder.staleness import resolve_max_staleness
from lightning_async.holder.types import HalfUpdatedError, Snapshot, Update
from lightning_async.monitoring.rejections import RejectionNotices
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.handshake import Address, HandshakeError
from lightning_async.runtime.listener import Listener
from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.transport.devices import RankDevices
from lightning_async.transport.staged import on_device

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """One rank's worker and, on rank 0, what serves all workers.

    Args:
        rank: this rank.
        world_size: number of ranks.
        optimizers: the module's optimizers; their parameters on rank 0 are the initial ones.
        options: how gradients are exchanged.
        latch: the run's failure latch.
        listener: rank 0's listener; None elsewhere or if rank 0 is alone.
        stats: collects what happens, on rank 0.
        observers: called on rank 0 with each update and the tickets that it covers: under the holder's lock or, where
            the holder has a process of its own, some milliseconds later and without the gradients.
        version: the version to start from.
        meet: gives every rank rank 0's string, once rank 0 serves: where workers find the holder.
        predecessor: an engine that this one takes the place of, since param groups were added or optimizers replaced:
            closed on every rank.
        devices: where this rank computes and where the holder lives; the host by default.
        process: the holder's own process, on rank 0; None if the holder is to be in this one.
        placement: where the holder is in this process; None for what ``devices`` says.
        on_lost: told on rank 0 which worker's connection was lost, and how; None where that ends the run.
        incarnation: how many workers of this rank came before.
        connect: connects the worker to a holder in parts, given what connects it to rank 0; None for one in one part.

    Attributes:
        optimizers: the optimizers that it was built for.
        states: what they show of the holder's state.
        shares_parameters: whether the module's parameters are the holder's own, as with one rank.
        transport: how this rank's gradients travel: "in process", "shm", "tcp" or "nccl".
        holder_device: where the holder is, "cpu" or "cuda".
        holder_threads: how many threads it may have for a large model; 1 on a GPU.

    Raises:
        ValueError: if the module or its optimizers cannot be exchanged so; the message says what can.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        optimizers: Sequence[torch.optim.Optimizer],
        options: ExchangeOptions,
        latch: FailureLatch,
        listener: Listener | None,
        stats: RunStats,
        observers: Sequence[UpdateObserver],
        version: int,
        meet: Callable[[str], str],
        predecessor: Engine | None = None,
        devices: RankDevices | None = None,
        process: HolderProcess | None = None,
        placement: HolderPlacement | None = None,
        on_lost: OnLost | None = None,
        incarnation: int = 0,
        connect: Callable[[Callable[[], Channel]], Channel] | None = None,
    ) -> None:
        devices = devices or RankDevices()
        connect = connect or (lambda dial: dial())
        self.optimizers = list(optimizers)
        self._rank = rank
        self._latch = latch
        self.shares_parameters = False
        self._grouped = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        self._owned = parameters_of(optimizers)
        self.layout = layout = FlatLayout(self._owned)
        self.service: Service | None = None
        self._stats = stats
        self._observers = observers
        self._rejections = RejectionNotices()
        slots = options.slots(world_size)
        if slots > 1:
            bound = resolve_max_staleness(options.max_staleness, world_size, options.gradients_per_update)
            check_overlap(bound, slots * world_size, len(optimizers), options.gradients_per_update)
        if options.gradients_per_update > 1 and len(optimizers) > 1:
            raise ValueError(
                f"gradients_per_update={options.gradients_per_update} takes one optimizer and there are "
                f"{len(optimizers)}: each one's step is to be seen by the next one's gradient. Leave it out"
            )
        local: HolderService | None = None
        if rank == 0:
            origins = None if predecessor is None else self._origins(predecessor)
            spec = HolderSpec(optimizers, options, world_size, version, origins, self._first_states(predecessor))
            if process is not None:
                assert listener is not None
                # Heartbeats come here still.
                listener.on_refused = stats.refuse
                self.service = process.serve(spec, listener.address, latch, self._observe, stats.refuse, on_lost)
            else:
                if placement is None:
                    on_gpu = devices.holder == "cuda"
                    placement = HolderPlacement(devices.own, devices.mine) if on_gpu else HolderPlacement()
                before = None if predecessor is None else predecessor.local_service
                local = HolderService(spec, latch, listener, self._observe, stats.refuse, placement, before, on_lost)
                self.service = local
                if listener is not None:
                    # Its updates are served by the reactor where they are to overlap with its training.
                    listener.admits_rank_0 = slots > 1
        address = None if self.service is None else self.service.address
        found = meet("" if address is None else address.as_json())
        self._address = Address.from_json(found) if found else None
        if local is not None and slots == 1:
            # Rounded parameters must not become the holder's.
            unrounded = all(parameter.dtype is layout.dtype for of_one in self._owned for parameter in of_one)
            self.shares_parameters = world_size == 1 and unrounded
            channels = [connect(lambda: local.local_channel(alone=self.shares_parameters))]
        else:
            groups = [HyperparamLayout(optimizer) for optimizer in optimizers]
            wires, overlaps = WorkerWires(layout), slots > 1
            holder = Address.from_json(found)

            def open_slot(slot: int) -> Channel:
                return dial(holder, rank, layout, groups, incarnation, slot, devices, overlaps, wires)

            channels = [connect(functools.partial(open_slot, slot)) for slot in range(slots)]
        self.transport = transport_of(channels[0])
        self.holder_device = devices.holder
        self.holder_threads = (
            1 if options.holder_threads == "auto" or devices.holder == "cuda" else options.holder_threads
        )
        own = [on_device(channel, devices.own) for channel in channels]
        tickets = None if predecessor is None else predecessor.worker.tickets
        alone, looks = world_size == 1, options.reject_nonfinite
        self.worker: Worker = Worker(rank, own, layout, optimizers, latch, alone, tickets, looks)
        self.worker.version = version
        self.states = OptimizerStates(optimizers, self._read_state, lambda: self.worker.version)

    @property
    def local_service(self) -> HolderService | None:
        """What serves the workers, if it is in this process."""
        return self.service if isinstance(self.service, HolderService) else None

    def owns(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether they are the optimizers that this was built for, with the same parameters in the same groups."""
        grouped = [[group["params"] for group in optimizer.param_groups] for optimizer in optimizers]
        same = list(map(id, optimizers)) == list(map(id, self.optimizers))
        return same and _identities(self._grouped) == _identities(grouped)

    def load_parameters(self) -> None:
        """Lets the holder take over what was done to rank 0's parameters between segments."""
        if self.service is not None:
            self.service.load_parameters(self._owned)

    def load_states(self) -> None:
        """Lets the holder take over what was done to the optimizers' states on rank 0 between segments."""
        if self.service is not None:
            changes = self.states.changes()
            if any(change is not None for change in changes):
                self.service.load_states(changes)

    def take_adapted(self) -> list[list[dict[str, Any]]] | None:
        """What the holder's steps have changed in the param groups, on rank 0; None elsewhere."""
        return None if self.service is None else self.service.take_adapted()

    def show_adapted(self, adapted: list[list[dict[str, Any]]]) -> None:
        """Sets in this rank's param groups what the holder's steps have changed."""
        for optimizer, values in zip(self.optimizers, adapted, strict=True):
            # Groups that were added since are not the holder's yet.
            for group, changed in zip(optimizer.param_groups, values, strict=False):
                group.update(changed)

    def place_of(self, optimizer: torch.optim.Optimizer) -> int | None:
        """The index of an optimizer that this was built for; None of another."""
        for index, own in enumerate(self.optimizers):
            if own is optimizer:
                return index
        return None

    def parameters(self, index: int) -> list[Tensor]:
        """The parameters of an optimizer, in the order in which they travel."""
        return self._owned[index]

    def snapshot(self) -> Snapshot | None:
        """Parameters, optimizer states and applied tickets of one version, on rank 0; None elsewhere."""
        return None if self.service is None else self.service.snapshot()

    def release_states(self, kept: Sequence[torch.optim.Optimizer] = ()) -> None:
        """Gives the optimizers states of their own again: what the holder has, or where that is if it was not fetched.

        Args:
            kept: those that a successor of this engine holds.
        """
        service = self.service
        elsewhere = (
            "the state of an optimizer that is no longer trained with, or whose fit was broken off, is on rank 0. Read "
            "it there (`if trainer.is_global_zero`), or on any rank before that"
        )
        try:
            self.show_adapted(self.take_adapted() or [[] for _ in self.optimizers])
            self.states.release(None if service is None else service.optimizer_state, elsewhere, kept)
        except HalfUpdatedError as error:
            self.states.release(None, str(error))
        except WorkerFailedError as error:
            log.debug("the optimizers' state went with the process that held it: %s", error)
            self.states.release(None, "the optimizer's state went with the process that held it")

    def close(self) -> None:
        """Ends this rank's part; on rank 0 after the other ranks have said goodbye, or a few seconds."""
        self.worker.close()
        if self.service is not None:
            self.service.close()

    def _origins(self, predecessor: Engine) -> Origins:
        places = {
            id(parameter): (index, position)
            for index, owned in enumerate(predecessor._owned)
            for position, parameter in enumerate(owned)
        }
        return [[places.get(id(parameter)) for parameter in owned] for owned in self._owned]

    def _first_states(self, predecessor: Engine | None) -> list[StateByPlace | None]:
        """For each optimizer the state that it comes with; None where what its parameters had before goes on."""
        if predecessor is None:
            return [state_by_place(optimizer) or None for optimizer in self.optimizers]
        changes = predecessor.states.changes()
        states: list[StateByPlace | None] = []
        for optimizer in self.optimizers:
            place = predecessor.place_of(optimizer)
            # Where its state was looked at it may have been changed.
            looked_at = place is None or changes[place] is not None
            states.append(state_by_place(optimizer) if looked_at else None)
        return states

    def _read_state(self, index: int) -> StateByPlace:
        """The holder's state of an optimizer; no collective, at any time."""
        if self.service is not None:
            return self.service.optimizer_state(index)
        assert self._address is not None
        self._latch.check()
        try:
            return fetch_state(self._address, self._rank, index)
        except HandshakeError as error:
            raise OptimizerStateError(str(error)) from error
        except ChannelClosedError as error:
            reason = f"lost by rank {self._rank}: {error}"
            raise WorkerFailedError(self._latch.explain_loss(lambda: RunFailure(0, reason))) from error

    def _observe(self, update: Update, tickets: tuple[int, ...]) -> None:
        self._stats.record(update)
        if update.rejected and (line := self._rejections.line(update)) is not None:
            log.warning("lightning_async: %s", line)
        for observer in self._observers:
            observer(update, tickets)


def check_overlap(bound: int | None, readers: int, optimizers: int, gradients_per_update: int) -> None:
    """Refuses ``overlap=True`` where the bound would leave it nothing to overlap.

    Args:
        bound: the staleness bound; None bounds nothing.
        readers: slots of all ranks.
        optimizers: their number.
        gradients_per_update: gradients that make an update.

    Raises:
        ValueError: if it is refused; the message says what to do.
    """
    if optimizers > 1:
        raise ValueError(
            f"overlap=True takes one optimizer and there are {optimizers}: the second one's gradient would be from "
            "before the first one's step. Leave overlap out"
        )
    places = None if bound is None else (bound + 1) * gradients_per_update
    if places is not None and places < readers:
        raise ValueError(
            f"overlap=True keeps two gradients of each rank under way, {readers} in all, and max_staleness={bound} "
            f"lets {places} of them. Take max_staleness of at least {-(-readers // gradients_per_update) - 1}, or "
            "leave overlap out"
        )


def _identities(groups: Sequence[Sequence[Sequence[Tensor]]]) -> list[list[list[int]]]:
    return [[[id(parameter) for parameter in group] for group in of_one] for of_one in groups]
