"""Processes that only hold or only push, for benchmarks of the exchange itself: no Lightning, no data."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.remote_service import HolderProcess
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch, WorkerFailedError
from lightning_async.runtime.handshake import HEARTBEAT, Address, handshake
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from lightning_async.shards.placement import ShardedPlacement
from lightning_async.shards.process import ShardProcess

__all__ = ["SHAPES", "TICKETS", "Shapes", "hold", "optimizer_of", "push", "work_for"]

Shapes = Sequence[tuple[int, ...]]

# Tensors of the paper's models: LeNet-5's, and as many of equal size as ResNet-18 has.
SHAPES: dict[str, Shapes] = {
    "44K": [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 256), (120,), (84, 120), (84,), (10, 84), (10,)],
    "1M": [(100_000,)] * 10,
    "11.2M": [(180_225,)] * 62,
    "30M": [(300_000,)] * 100,
    "100M": [(1_000_000,)] * 100,
}
# More than any benchmark takes.
TICKETS = 10**9


def optimizer_of(shapes: Shapes) -> AMSGrad:
    """AMSGrad over parameters of these shapes."""
    return AMSGrad([nn.Parameter(torch.zeros(shape)) for shape in shapes], lr=1e-6)


def hold(
    optimizer: torch.optim.Optimizer,
    ranks: int,
    tell_address: Callable[[str], object],
    process: HolderProcess | None = None,
    host: str = "127.0.0.1",
    shards: Sequence[ShardProcess] = (),
    **options: Any,
) -> tuple[Engine, RunStats]:
    """Rank 0's side, ready for the others.

    Args:
        optimizer: over the initial parameters.
        ranks: number of ranks, this one included.
        tell_address: called with what the other ranks need to find it.
        process: where the holder is to be; without one, in a thread of rank 0's.
        host: the address that the other ranks find it at.
        shards: processes for the holder's shards but the first.
        options: see `ExchangeOptions`.
    """
    latch = FailureLatch()
    listener = Listener(host, ranks, Heartbeats(0, latch, 60.0)) if ranks > 1 else None
    stats = RunStats(ranks)

    def meet(holder: str) -> str:
        # The listener is where heartbeats go.
        if listener is not None:
            tell_address(json.dumps([listener.address.as_json(), holder]))
        return holder

    place: Any = "thread" if process is None else "process"
    chosen = ExchangeOptions(max_staleness=None, holder=place, holder_shards=1 + len(shards), **options)
    engine = Engine(
        rank=0,
        world_size=ranks,
        optimizers=[optimizer],
        options=chosen,
        latch=latch,
        listener=listener,
        stats=stats,
        observers=[],
        version=0,
        meet=meet,
        process=process,
        placement=ShardedPlacement(shards, chosen, ranks) if shards else None,
    )
    assert engine.service is not None
    engine.service.begin_epoch(range(TICKETS))
    engine.service.open(TICKETS)
    return engine, stats


def work_for(addresses: str, rank: int, ranks: int, optimizer: torch.optim.Optimizer, **options: Any) -> Engine:
    """Another rank's side, which holds parameters already; ``addresses`` is what `hold` has told."""
    listener, holder = json.loads(addresses)
    latch = FailureLatch()
    Heartbeats(rank, latch, 60.0).add(0, handshake(Address.from_json(listener), rank, HEARTBEAT)[0])
    engine = Engine(
        rank=rank,
        world_size=ranks,
        optimizers=[optimizer],
        options=ExchangeOptions(**options),
        latch=latch,
        listener=None,
        stats=RunStats(ranks),
        observers=[],
        version=0,
        meet=lambda mine: str(holder),
    )
    engine.worker.pull()
    return engine


def push(
    addresses: str, rank: int, ranks: int, shapes: Shapes, interval_s: float = 0.0, reject_nonfinite: bool = True
) -> None:
    """Pushes a ready gradient again and again, until killed.

    Args:
        addresses: what `hold` has told.
        rank: this rank.
        ranks: number of ranks.
        shapes: of the parameters.
        interval_s: seconds from an answer to the next push.
        reject_nonfinite: whether it looks for NaN and infinity in each gradient.
    """
    torch.set_num_threads(1)
    optimizer = optimizer_of(shapes)
    worker = work_for(addresses, rank, ranks, optimizer, reject_nonfinite=reject_nonfinite).worker
    # One backward, so that the gradients are where a training step leaves them.
    loss: Any = torch.stack(
        [parameter.sum() for group in optimizer.param_groups for parameter in group["params"]]
    ).sum()
    loss.backward()
    # The others are ended one by one, which looks like a failure.
    with contextlib.suppress(WorkerFailedError):
        while True:
            worker.step(0)
            if interval_s:
                time.sleep(interval_s)
