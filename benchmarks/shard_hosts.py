"""Bytes at the busiest host, and updates a second, of a holder whose shards are spread over hosts.

Called by ``benchmarks.shards --hosts``. Each host is a network namespace of this machine, with an interface of its own
that has a rate, and one rank that pushes a ready gradient as soon as it is answered. An update is the mean of one
gradient of each rank, so that all have equal shares whatever they cost. It takes root and iproute2.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from benchmarks.network import Network
from benchmarks.processes import SHAPES, TICKETS, optimizer_of
from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch, WorkerFailedError
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from lightning_async.shards.shard_process import ShardServerProcess
from lightning_async.shards.spread import SpreadShards, shards_of_host

__all__ = ["Measured", "measure_hosts"]

# Until every rank is in the run, and pushes.
_START_S = 300.0


class Measured(NamedTuple):
    """What one number of shards comes to.

    Args:
        updates_per_s: each of one gradient of every rank.
        busiest_mb: megabytes for an update over the interface of the host that carries most in one direction.
        first_mb: the same of rank 0's host.
    """

    updates_per_s: float
    busiest_mb: float
    first_mb: float


def measure_hosts(size: str, shards: int, hosts: int, megabits: float, seconds: float) -> Measured:
    """Measures one number of shards.

    Args:
        size: of the model, a key of `SHAPES`.
        shards: number of shards.
        hosts: number of hosts, with a rank each.
        megabits: rate of each host's interface, in each direction.
        seconds: how long to measure.
    """
    network = Network(hosts)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        network.limit(megabits)
        for rank, host in enumerate(network.hosts):
            mine, theirs = context.Pipe()
            process = context.Process(target=_run_rank, args=(theirs, size, shards, hosts, rank), daemon=False)
            host.run(process.start)
            pipes.append(mine)
            processes.append(process)
        # The ranks meet: where rank 0 listens, where the shards are, where the holder is, and that it serves.
        for _ in range(4):
            texts = [pipe.recv() for pipe in pipes]
            for pipe in pipes:
                pipe.send(texts)

        def look() -> tuple[int, float, list[tuple[int, int]]]:
            pipes[0].send(None)
            return pipes[0].recv(), time.perf_counter(), [network.carried_bytes(host) for host in range(hosts)]

        deadline = time.monotonic() + _START_S
        while look()[0] < 2:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{shards} shards on {hosts} hosts have not begun in {_START_S:g} s")
            time.sleep(0.2)
        before, began, carried = look()
        time.sleep(seconds)
        after, ended, carried_then = look()
        updates = max(1, after - before)
        each = [
            max(then - earlier for then, earlier in zip(end, begin, strict=True)) / updates / 1e6
            for end, begin in zip(carried_then, carried, strict=True)
        ]
        return Measured(updates / (ended - began), max(each), each[0])
    finally:
        for process in processes:
            process.kill()
            process.join()
        network.close()


def _run_rank(pipe: Connection, size: str, shards: int, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    latch, optimizer = FailureLatch(), optimizer_of(SHAPES[size])
    options = ExchangeOptions(
        max_staleness=0, gradients_per_update=ranks, transport="tcp", holder_shards=shards, reject_nonfinite=False
    )
    processes = [ShardServerProcess(shard, rank) for shard in shards_of_host(shards, rank, ranks)]

    def meet(text: str) -> list[str]:
        pipe.send(text)
        texts: list[str] = pipe.recv()
        return texts

    listener = Listener(Network.ADDRESS, ranks, Heartbeats(0, latch, 60.0)) if rank == 0 else None
    first = Address.from_json(meet("" if listener is None else listener.address.as_json())[0])
    spread = SpreadShards(rank, ranks, options, latch, processes, first, meet)
    if is_spread := shards > 1:
        spread.prepare([optimizer], 0)
    engine = Engine(
        rank=rank,
        world_size=ranks,
        optimizers=[optimizer],
        options=options,
        latch=latch,
        listener=listener,
        stats=RunStats(ranks),
        observers=[],
        version=0,
        meet=lambda address: meet(address)[0],
        placement=spread.placement() if is_spread else None,
        connect=spread.connect if is_spread else None,
    )
    if engine.service is not None:
        engine.service.begin_epoch(range(TICKETS))
        engine.service.open(TICKETS)
    meet("")
    if rank == 0:
        threading.Thread(target=_tell, args=(pipe, engine), daemon=True).start()
    _push(engine, optimizer)


def _tell(pipe: Connection, engine: Engine) -> None:
    assert engine.local_service is not None
    while pipe.recv() is None:
        pipe.send(engine.local_service.holder.version)


def _push(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    groups: Sequence[dict[str, Any]] = optimizer.param_groups
    loss: Any = torch.stack([parameter.sum() for group in groups for parameter in group["params"]]).sum()
    loss.backward()
    engine.worker.pull()
    # The others are ended one by one, which looks like a failure.
    with suppress(WorkerFailedError):
        while True:
            engine.worker.step(0)
