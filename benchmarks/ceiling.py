"""How many updates a second the holder takes: workers that push a ready gradient at once and compute nothing.

Run ``python -m benchmarks.ceiling``. Each worker is a process of its own on this host; rank 0 only holds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from typing import Any

import torch
from torch import nn

from benchmarks.record import save
from lightning_async.amsgrad import AMSGrad
from lightning_async.engine import Engine
from lightning_async.failure import FailureLatch
from lightning_async.frontdoor import LIFELINE, Address, FrontDoor, introduce
from lightning_async.lifeline import Lifelines
from lightning_async.monitor import RunStats
from lightning_async.options import ExchangeOptions

# Tensors of the paper's models: LeNet-5's, and as many of equal size as ResNet-18 has.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "44K": [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 256), (120,), (84, 120), (84,), (10, 84), (10,)],
    "11.2M": [(180_225,)] * 62,
    "100M": [(1_000_000,)] * 100,
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["44K", "11.2M"], choices=list(SHAPES))
    parser.add_argument("--wire-dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--transports", nargs="+", default=["shm", "gloo"])
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    print("parameters transport workers  updates/s   us/update")
    for size in arguments.sizes:
        for transport in arguments.transports:
            for workers in arguments.workers:
                rate = updates_per_second(SHAPES[size], workers, transport, arguments.seconds, arguments.wire_dtype)
                found.append({"size": size, "transport": transport, "workers": workers, "updates_per_second": rate})
                print(f"{size:>10} {transport:>9} {workers:>7} {rate:>10.0f} {1e6 / rate:>11.0f}", flush=True)
    save("ceiling" if arguments.wire_dtype == "fp32" else f"ceiling_{arguments.wire_dtype}", vars(arguments), found)


def updates_per_second(
    shapes: list[tuple[int, ...]], workers: int, transport: str, seconds: float, wire_dtype: str = "fp32"
) -> float:
    """Updates a second that ``workers`` processes get out of one holder, after a second of warming up."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.SimpleQueue(), context.SimpleQueue()
    processes = [context.Process(target=_hold, args=(ready, results, shapes, workers, transport, wire_dtype, seconds))]
    processes[0].start()
    address = ready.get()
    for rank in range(1, workers + 1):
        processes.append(context.Process(target=_push, args=(address, rank, workers + 1, shapes)))
        processes[-1].start()
    rate = float(results.get())
    # The workers first: they would complain of a lost holder.
    for process in reversed(processes):
        process.kill()
        process.join()
    return rate


def _optimizer(shapes: list[tuple[int, ...]]) -> AMSGrad:
    return AMSGrad([nn.Parameter(torch.zeros(shape)) for shape in shapes], lr=1e-6)


def _hold(
    ready: Any,
    results: Any,
    shapes: list[tuple[int, ...]],
    workers: int,
    transport: Any,
    wire_dtype: Any,
    seconds: float,
) -> None:
    torch.set_num_threads(1)
    latch = FailureLatch()
    door = FrontDoor("127.0.0.1", workers + 1, Lifelines(0, latch, 60.0))
    stats = RunStats(workers + 1)
    options = ExchangeOptions(
        max_staleness=None, transport=transport, wire_dtype=wire_dtype, parameter_wire_dtype=wire_dtype
    )
    engine = Engine(
        rank=0,
        world_size=workers + 1,
        optimizers=[_optimizer(shapes)],
        options=options,
        latch=latch,
        address=door.address,
        door=door,
        stats=stats,
        observers=[],
        version=0,
        meet=lambda: ready.put(door.address.as_json()),
    )
    assert engine.ledger is not None
    tickets = int(20_000 * (seconds + 30))
    engine.ledger.begin_epoch(range(tickets))
    engine.ledger.open(tickets)
    while min(list(stats.updates_by_rank.values())[1:]) < 5:
        time.sleep(0.01)
    time.sleep(1.0)
    before, started = stats.updates, time.perf_counter()
    time.sleep(seconds)
    results.put((stats.updates - before) / (time.perf_counter() - started))
    threading.Event().wait()


def _push(address_json: str, rank: int, ranks: int, shapes: list[tuple[int, ...]]) -> None:
    torch.set_num_threads(1)
    latch, address = FailureLatch(), Address.from_json(address_json)
    Lifelines(rank, latch, 60.0).add(0, introduce(address, rank, LIFELINE)[0])
    optimizer = _optimizer(shapes)
    engine = Engine(
        rank=rank,
        world_size=ranks,
        optimizers=[optimizer],
        options=ExchangeOptions(),
        latch=latch,
        address=address,
        door=None,
        stats=RunStats(ranks),
        observers=[],
        version=0,
        meet=lambda: None,
    )
    worker = engine.worker
    worker.pull()
    # One backward, so that the gradients are where a training step leaves them.
    loss: Any = torch.stack(
        [parameter.sum() for group in optimizer.param_groups for parameter in group["params"]]
    ).sum()
    loss.backward()
    while True:
        worker.step(0)


if __name__ == "__main__":
    main()
