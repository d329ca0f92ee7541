"""This rank's part of the exchange, put together: a worker on every rank; holder, ledger and server on rank 0.

Above `server.py` and `worker.py`; below `strategy.py`, which builds it for each fit. Knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.channels import dial
from lightning_async.devices import RankDevices
from lightning_async.failure import FailureLatch
from lightning_async.frontdoor import Address, FrontDoor
from lightning_async.holder import Holder, Snapshot, Update
from lightning_async.hyper import HyperLayout
from lightning_async.layout import FlatLayout
from lightning_async.monitor import RunStats
from lightning_async.options import ExchangeOptions
from lightning_async.server import Server
from lightning_async.site import HolderSite
from lightning_async.staleness import Barrier, resolve_max_staleness
from lightning_async.tickets import Ledger
from lightning_async.transport.staged import on_device
from lightning_async.worker import Worker

__all__ = ["Engine", "UpdateObserver"]

UpdateObserver = Callable[[Update, tuple[int, ...]], None]


class Engine:
    """One rank's worker and, on rank 0, what serves all workers.

    Args:
        rank: this rank.
        world_size: number of ranks.
        optimizers: the module's optimizers; their parameters on rank 0 are the initial ones.
        options: how gradients are exchanged.
        latch: the run's failure latch.
        address: of rank 0's front door; None if rank 0 is alone.
        door: rank 0's front door; None elsewhere or if rank 0 is alone.
        stats: collects what happens, on rank 0.
        observers: called on rank 0, under the holder's lock, with each update and the tickets that it covers.
        version: the version to start from.
        meet: waits until every rank calls it; keeps workers from dialling before rank 0 serves.
        predecessor: an engine that this one takes the place of, since param groups were added: closed on every rank.
        devices: where this rank computes and where the holder lives; the host by default.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        optimizers: Sequence[torch.optim.Optimizer],
        options: ExchangeOptions,
        latch: FailureLatch,
        address: Address | None,
        door: FrontDoor | None,
        stats: RunStats,
        observers: Sequence[UpdateObserver],
        version: int,
        meet: Callable[[], None],
        predecessor: Engine | None = None,
        devices: RankDevices | None = None,
    ) -> None:
        devices = devices or RankDevices()
        grouped = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        owned = [[parameter for group in of_one for parameter in group] for of_one in grouped]
        layout = FlatLayout(owned)
        groups = [HyperLayout(optimizer) for optimizer in optimizers]
        self.layout = layout
        self.holder: Holder | None = None
        self.ledger: Ledger | None = None
        self._server: Server | None = None
        self._owned = owned
        self._grouped = grouped
        self._stats = stats
        self._observers = observers
        lanes = 2 if options.overlap and world_size > 1 else 1
        bound = resolve_max_staleness(options.max_staleness, world_size)
        if lanes > 1:
            _check_overlap(bound, lanes * world_size, len(optimizers))
        if rank == 0:
            kept = None if predecessor is None else predecessor.ledger
            self.ledger = kept or Ledger(world_size, options.batches)
            initial = layout.buffer()
            for index, parameters in enumerate(owned):
                for view, parameter in zip(layout.views(initial, index), parameters, strict=True):
                    view.copy_(parameter.detach())
            barrier = Barrier(bound, options.on_stale, version=version)
            site = HolderSite(devices.own, devices.mine) if devices.holder == "cuda" else HolderSite()
            self.holder = site.make_holder(layout, initial.to(site.device), optimizers, barrier, latch, self._observe)
            if predecessor is not None:
                self._inherit(predecessor)
            self._server = Server(
                self.holder,
                self.ledger,
                layout,
                groups,
                latch,
                door,
                options.transport,
                on_refused=stats.refuse,
                wire=(options.wire_dtype, options.parameter_wire_dtype),
                site=site,
                workers=world_size,
            )
            if door is not None:
                # Its updates are served by the reactor where they are to overlap with its training.
                door.rank_0_rings = lanes > 1
        meet()
        if self._server is not None and lanes == 1:
            # Rounded parameters must not become the holder's.
            unrounded = all(parameter.dtype is layout.dtype for parameters in owned for parameter in parameters)
            channels = [self._server.local_channel(alone=world_size == 1 and unrounded)]
        else:
            assert address is not None
            channels = [
                dial(address, rank, layout, groups, lane=lane, devices=devices, overlaps=lanes > 1)
                for lane in range(lanes)
            ]
        self.worker = Worker(rank, [on_device(channel, devices.own) for channel in channels], layout, optimizers, latch)
        self.worker.version = version

    def owns(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether the optimizers have the same parameters in the same groups as when this was built."""
        return _identities(self._grouped) == _identities(
            [[group["params"] for group in optimizer.param_groups] for optimizer in optimizers]
        )

    def adopt_parameters(self) -> None:
        """Lets the holder take over what was done to rank 0's parameters between segments."""
        if self.holder is not None:
            self.holder.adopt(self._owned)

    def snapshot(self) -> Snapshot | None:
        """Parameters, optimizer states and applied tickets of one version, on rank 0; None elsewhere."""
        if self.holder is None or self.ledger is None:
            return None
        return self.holder.snapshot(self.ledger.applied)

    def close(self) -> None:
        """Ends this rank's part; on rank 0 after the other ranks have said goodbye, or a few seconds."""
        self.worker.close()
        if self._server is not None:
            self._server.close()

    def _inherit(self, predecessor: Engine) -> None:
        """Gives the holder what the predecessor's has made of the parameters that it had."""
        assert predecessor.holder is not None and self.holder is not None
        before = predecessor.holder.snapshot()
        known: dict[int, Tensor] = {}
        states: dict[int, Any] = {}
        for index, owned in enumerate(predecessor._owned):
            views = predecessor.layout.views(before.parameters, index)
            known |= {id(parameter): view for parameter, view in zip(owned, views, strict=True)}
            state = before.optimizer_states[index]["state"]
            states |= {id(parameter): state[i] for i, parameter in enumerate(owned) if i in state}
        inherited = self.holder.snapshot().optimizer_states
        for optimizer, owned in zip(inherited, self._owned, strict=True):
            optimizer["state"] = {i: states[id(p)] for i, p in enumerate(owned) if id(p) in states}
        self.holder.restore(before.version, inherited)
        self.holder.adopt([[known.get(id(parameter), parameter) for parameter in owned] for owned in self._owned])

    def _observe(self, update: Update) -> None:
        assert self.ledger is not None
        tickets = self.ledger.complete(update.push.worker, update.push.tickets)
        self._stats.record(update)
        for observer in self._observers:
            observer(update, tickets)


def _check_overlap(bound: int | None, readers: int, optimizers: int) -> None:
    if optimizers > 1:
        raise ValueError(
            f"overlap=True takes one optimizer and there are {optimizers}: the second one's gradient would be from "
            "before the first one's step. Leave overlap out"
        )
    if bound is not None and bound < readers - 1:
        raise ValueError(
            f"overlap=True keeps two gradients of each rank under way, {readers} in all, and max_staleness={bound} "
            f"lets {bound + 1} of them. Take max_staleness of at least {readers - 1}, or leave overlap out"
        )


def _identities(groups: Sequence[Sequence[Sequence[Tensor]]]) -> list[list[list[int]]]:
    return [[[id(parameter) for parameter in group] for group in of_one] for of_one in groups]
