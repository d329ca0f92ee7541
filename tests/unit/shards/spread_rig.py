"""Ranks and shards that are reached over the network, as threads of one process with sockets between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.types import Update
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from lightning_async.shards.operations import ShardSpec
from lightning_async.shards.shard_server import ShardServer
from lightning_async.shards.spread import SpreadShards
from tests.unit.shards.rig import parameters_of

SHAPES = [(5, 11), (3,), (40,)]

_T = TypeVar("_T")


class ServedShard:
    """A `ShardServerProcess` without a process; its latch is what a heartbeat would tell its starter by."""

    def __init__(self, shard: int, rank: int) -> None:
        self.shard = shard
        self.latch = FailureLatch()
        self.server = ShardServer(shard, rank, self.latch)

    def listen(self, host: str, workers: int, timeout_s: float, token: str, latch: FailureLatch) -> Address:
        self.latch.subscribe(latch.trip)
        return self.server.listen(host, workers, timeout_s, token).without_token()

    def offer(self, number: int, spec: ShardSpec) -> None:
        self.server.offer(number, spec)


class Spread:
    """Rank 0 and the other ranks of a run, each with an engine; ``updates`` are the holder's.

    Rank 1 starts the shards' processes. ``run`` calls what is given on a rank's host, and ``address`` is rank 0's.
    """

    def __init__(
        self,
        shards: int,
        workers: int,
        run: Callable[[int, Callable[[], Any]], Any] = lambda rank, call: call(),
        address: str = "127.0.0.1",
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        **options: Any,
    ) -> None:
        starter, self._run, self.shapes = 1, run, shapes
        self.options = ExchangeOptions(transport="tcp", holder_shards=shards, **options)
        self.workers = workers
        self.latches = [FailureLatch() for _ in range(workers)]
        self.heartbeats = run(0, lambda: Heartbeats(0, self.latches[0], 60.0))
        self.listener = run(0, lambda: Listener(address, workers, self.heartbeats))
        self.shards = [ServedShard(shard, starter) for shard in range(1, shards)]
        self.told = ["[]"] * workers
        self.updates: list[Update] = []
        self.parameters = [parameters_of(shapes) for _ in range(workers)]
        self.optimizers = [AMSGrad(own, lr=0.05, weight_decay=0.01) for own in self.parameters]
        # The starter of the shards' processes first, since the others are told of them.
        self.spread: dict[int, SpreadShards] = {
            rank: run(rank, lambda rank=rank: self._spread(rank))
            for rank in sorted(range(workers), key=lambda rank: rank != starter)
        }
        self.engines: dict[int, Engine] = {}
        # A starter offers while rank 0 builds its engine.
        for rank in reversed(range(workers)):
            self.spread[rank].prepare([self.optimizers[rank]], 0)
        self.join(0)
        assert self.service is not None
        self.service.begin_epoch(range(10**6))
        self.service.open(10**6)

    def _spread(self, rank: int) -> SpreadShards:
        own: Any = self.shards if not any(json.loads(text) for text in self.told) else []

        def gather(text: str) -> list[str]:
            if own:
                self.told[rank] = text
            return self.told

        return SpreadShards(rank, self.workers, self.options, self.latches[rank], own, self.listener.address, gather)

    @property
    def service(self) -> Any:
        return self.engines[0].service

    def join(self, rank: int) -> Engine:
        """Builds another rank's engine."""
        self.engines[rank] = self._run(rank, lambda: self._engine(rank))
        return self.engines[rank]

    def rebuild(self) -> None:
        """Has all ranks build their engines anew, as where user code has changed the optimizers."""
        former, version = dict(self.engines), self.service.holder.version
        for rank in sorted(former, reverse=True):
            former[rank].close()
        for rank in reversed(range(self.workers)):
            self.spread[rank].prepare([self.optimizers[rank]], version)
        for rank in sorted(former):
            self.engines[rank] = self._engine(rank, former[rank])

    def _engine(self, rank: int, predecessor: Engine | None = None) -> Engine:
        def meet(address: str) -> str:
            if rank == 0:
                self._address = address
            return self._address

        return Engine(
            rank=rank,
            world_size=self.workers,
            optimizers=[self.optimizers[rank]],
            options=self.options,
            latch=self.latches[rank],
            listener=self.listener if rank == 0 else None,
            stats=RunStats(self.workers),
            observers=[lambda update, tickets: self.updates.append(update)] if rank == 0 else [],
            version=0,
            meet=meet,
            placement=self.spread[rank].placement(),
            connect=self.spread[rank].connect,
            predecessor=predecessor,
        )

    def values(self, rank: int) -> Tensor:
        """A rank's parameters."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters[rank]])

    def compute(self, rank: int, step: int) -> None:
        """Gives a rank a gradient that depends on its rank and the step."""
        for parameter, gradient in zip(self.parameters[rank], gradients_of(rank, step, self.shapes), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(gradient)

    def close(self) -> None:
        """Ends everything, rank 0 last."""
        for rank in sorted(self.engines, reverse=True):
            self.engines[rank].close()
        self.spread[0].end()
        for shard in self.shards:
            shard.server.wait_until_over()
            shard.server.close()
        self.listener.close()
        self.heartbeats.close()


def gradients_of(rank: int, step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """What `Spread.compute` gives."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]
