"""This rank's part of the exchange, put together: a worker on every rank, and on rank 0 what serves them.

Above `service.py`, `holder_process.py` and `worker.py`; below `strategy.py`, which builds it for each fit. Knows no
Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_async.channels import dial
from lightning_async.devices import RankDevices
from lightning_async.failure import FailureLatch
from lightning_async.frontdoor import Address, FrontDoor
from lightning_async.holder import Snapshot, Update
from lightning_async.holder_process import HolderProcess
from lightning_async.hyper import HyperLayout
from lightning_async.layout import FlatLayout
from lightning_async.monitor import RunStats
from lightning_async.options import ExchangeOptions
from lightning_async.service import Held, HolderService, Origins, Service, UpdateObserver, parameters_of
from lightning_async.site import HolderSite
from lightning_async.staleness import resolve_max_staleness
from lightning_async.transport.staged import on_device
from lightning_async.worker import Worker

__all__ = ["Engine"]


class Engine:
    """One rank's worker and, on rank 0, what serves all workers.

    Args:
        rank: this rank.
        world_size: number of ranks.
        optimizers: the module's optimizers; their parameters on rank 0 are the initial ones.
        options: how gradients are exchanged.
        latch: the run's failure latch.
        door: rank 0's front door; None elsewhere or if rank 0 is alone.
        stats: collects what happens, on rank 0.
        observers: called on rank 0 with each update and the tickets that it covers: under the holder's lock or, where
            the holder has a process of its own, some milliseconds later and without the gradients.
        version: the version to start from.
        meet: gives every rank rank 0's string, once rank 0 serves: where workers find the holder.
        predecessor: an engine that this one takes the place of, since param groups were added: closed on every rank.
        devices: where this rank computes and where the holder lives; the host by default.
        process: the holder's own process, on rank 0; None if the holder is to be in this one.

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
        door: FrontDoor | None,
        stats: RunStats,
        observers: Sequence[UpdateObserver],
        version: int,
        meet: Callable[[str], str],
        predecessor: Engine | None = None,
        devices: RankDevices | None = None,
        process: HolderProcess | None = None,
    ) -> None:
        devices = devices or RankDevices()
        self._grouped = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        self._owned = parameters_of(optimizers)
        self.layout = layout = FlatLayout(self._owned)
        self.service: Service | None = None
        self._stats = stats
        self._observers = observers
        lanes = options.lanes(world_size)
        if lanes > 1:
            bound = resolve_max_staleness(options.max_staleness, world_size)
            _check_overlap(bound, lanes * world_size, len(optimizers))
        local: HolderService | None = None
        if rank == 0:
            origins = None if predecessor is None else self._origins(predecessor)
            held = Held(optimizers, options, world_size, version, origins)
            if process is not None:
                assert door is not None
                # Lifelines come here still.
                door.on_refused = stats.refuse
                self.service = process.serve(held, door.address.host, latch, self._observe, stats.refuse)
            else:
                site = HolderSite(devices.own, devices.mine) if devices.holder == "cuda" else HolderSite()
                before = None if predecessor is None else predecessor.local_service
                local = HolderService(held, latch, door, self._observe, stats.refuse, site, before)
                self.service = local
                if door is not None:
                    # Its updates are served by the reactor where they are to overlap with its training.
                    door.rank_0_rings = lanes > 1
        address = None if self.service is None else self.service.address
        found = meet("" if address is None else address.as_json())
        if local is not None and lanes == 1:
            # Rounded parameters must not become the holder's.
            unrounded = all(parameter.dtype is layout.dtype for of_one in self._owned for parameter in of_one)
            channels = [local.local_channel(alone=world_size == 1 and unrounded)]
        else:
            groups = [HyperLayout(optimizer) for optimizer in optimizers]
            channels = [
                dial(Address.from_json(found), rank, layout, groups, lane=lane, devices=devices, overlaps=lanes > 1)
                for lane in range(lanes)
            ]
        own = [on_device(channel, devices.own) for channel in channels]
        self.worker = Worker(rank, own, layout, optimizers, latch, alone=world_size == 1)
        self.worker.version = version

    @property
    def local_service(self) -> HolderService | None:
        """What serves the workers, if it is in this process."""
        return self.service if isinstance(self.service, HolderService) else None

    def owns(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether the optimizers have the same parameters in the same groups as when this was built."""
        return _identities(self._grouped) == _identities(
            [[group["params"] for group in optimizer.param_groups] for optimizer in optimizers]
        )

    def adopt_parameters(self) -> None:
        """Lets the holder take over what was done to rank 0's parameters between segments."""
        if self.service is not None:
            self.service.adopt(self._owned)

    def snapshot(self) -> Snapshot | None:
        """Parameters, optimizer states and applied tickets of one version, on rank 0; None elsewhere."""
        return None if self.service is None else self.service.snapshot()

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

    def _observe(self, update: Update, tickets: tuple[int, ...]) -> None:
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
