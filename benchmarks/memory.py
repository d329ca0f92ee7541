"""What the exchange keeps in memory, against the formula.

Run ``python -m benchmarks.memory``. With P parameters of four bytes and N ranks on one host:

    holder: parameters, m, v and the maximum of v:            16 P
    each rank: its gradient and its parameters, shared:        8 P

The module's own parameters are views of the worker's buffer and cost nothing more. Measured is what all processes
together occupy (the proportional set size, which counts a shared page once) beyond what they do before they join.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.processes import SHAPES, hold, work_for
from benchmarks.record import save
from lightning_async.amsgrad import AMSGrad


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["11.2M", "100M"], choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    print("parameters ranks  measured, MiB  formula, MiB  ratio  threads of rank 0")
    for size in arguments.sizes:
        for ranks in arguments.ranks:
            numel = sum(torch.Size(shape).numel() for shape in SHAPES[size])
            formula = numel * (16 + 8 * ranks) / 2**20
            measured, threads = occupied(size, ranks)
            print(
                f"{size:>10} {ranks:>5} {measured:>14.0f} {formula:>13.0f} {measured / formula:>6.3f} {threads:>9}",
                flush=True,
            )
            found.append({"size": size, "ranks": ranks, "measured": measured, "formula": formula, "threads": threads})
    save("memory", vars(arguments), found)


def occupied(size: str, ranks: int) -> tuple[float, int]:
    """MiB that the ranks occupy more after their first updates than before, and rank 0's threads."""
    context = multiprocessing.get_context("spawn")
    news, addresses = context.SimpleQueue(), context.SimpleQueue()
    start, stop = context.Event(), context.Event()
    processes = [
        context.Process(target=_train, args=(news, addresses, start, stop, size, rank, ranks)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    before = sum(news.get()[0] for _ in processes)
    start.set()
    for _ in processes:
        news.get()
    # Only now has everybody mapped everything.
    stop.set()
    reports = [news.get() for _ in processes]
    for process in processes:
        process.kill()
        process.join()
    after, threads = sum(size for size, _ in reports), max(threads for _, threads in reports)
    return (after - before) / 2**20, threads


def _proportional_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell the proportional set size")


def _report(news: Any) -> None:
    news.put((_proportional_bytes(), threading.active_count()))


def _optimizer(size: str) -> AMSGrad:
    return AMSGrad([nn.Parameter(torch.zeros(shape)) for shape in SHAPES[size]], lr=1e-6)


def _train(news: Any, addresses: Any, start: Any, stop: Any, size: str, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    # What torch loads at its first backward and step is not the exchange's.
    _backward(_optimizer("44K"))
    _report(news)
    start.wait()
    optimizer = _optimizer(size)
    if rank == 0:
        engine, _ = hold(optimizer, ranks, lambda told: [addresses.put(told) for _ in range(ranks - 1)])
        engine.worker.pull()
    else:
        engine = work_for(addresses.get(), rank, ranks, optimizer)
    for _ in range(3):
        _backward(optimizer)
        engine.worker.step(0)
        optimizer.zero_grad()
        time.sleep(0.2)
    _report(news)
    stop.wait()
    _report(news)
    threading.Event().wait()


def _backward(optimizer: torch.optim.Optimizer) -> None:
    loss: Any = torch.stack([p.sum() for group in optimizer.param_groups for p in group["params"]]).sum()
    loss.backward()


if __name__ == "__main__":
    main()
