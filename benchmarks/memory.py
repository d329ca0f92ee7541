"""What the exchange keeps in memory, against the formula.

Run ``python -m benchmarks.memory``. With P parameters of four bytes and N ranks on one host:

    holder: parameters, m, v and the maximum of v:            16 P
    each rank: its gradient and its parameters, shared:        8 P

The module's own parameters are views of the worker's buffer and cost nothing more. Measured is what all processes
together occupy (the proportional set size, which counts a shared page once) beyond what they do before they join. With
``holder="process"`` that includes the holder's process, whose own occupation before it holds anything stands beside it.
"""

from __future__ import annotations

import argparse
import itertools
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
from lightning_async.exchange.remote_service import HolderProcess
from lightning_async.holder.amsgrad import AMSGrad


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["11.2M", "100M"], choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--holders", nargs="+", default=["thread", "process"], choices=["thread", "process"])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    print("parameters ranks  holder   measured, MiB  formula, MiB  ratio  threads of rank 0  the empty process, MiB")
    for size, ranks, holder in itertools.product(arguments.sizes, arguments.ranks, arguments.holders):
        numel = sum(torch.Size(shape).numel() for shape in SHAPES[size])
        formula = numel * (16 + 8 * ranks) / 2**20
        measured, threads, empty = occupied(size, ranks, holder)
        print(
            f"{size:>10} {ranks:>5}  {holder:<7} {measured:>14.0f} {formula:>13.0f} {measured / formula:>6.3f} "
            f"{threads:>18} {empty:>23.0f}",
            flush=True,
        )
        row = {"size": size, "ranks": ranks, "holder": holder, "measured": measured, "formula": formula}
        found.append(row | {"threads": threads, "empty": empty})
    save("memory", vars(arguments), found)


def occupied(size: str, ranks: int, holder: str) -> tuple[float, int, float]:
    """MiB that all occupy more after their first updates than before, rank 0's threads, the holder's empty process."""
    context = multiprocessing.get_context("spawn")
    news, addresses = context.SimpleQueue(), context.SimpleQueue()
    start, stop = context.Event(), context.Event()
    processes = [
        context.Process(target=_train, args=(news, addresses, start, stop, size, rank, ranks, holder))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    before = [news.get() for _ in processes]
    start.set()
    for _ in processes:
        news.get()
    # Only now has everybody mapped everything.
    stop.set()
    after = [news.get() for _ in processes]
    for process in processes:
        process.kill()
        process.join()
    grown = sum(own + apart for own, apart, _ in after) - sum(own + apart for own, apart, _ in before)
    return grown / 2**20, max(threads for *_, threads in after), sum(apart for _, apart, _ in before) / 2**20


def _proportional_bytes(pid: int | str = "self") -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell the proportional set size")


def _settled(process: HolderProcess) -> None:
    """Waits until the process has imported what it needs."""
    last = -1
    while last != (last := _proportional_bytes(process.pid)):
        time.sleep(1.0)


def _report(news: Any, process: HolderProcess | None) -> None:
    apart = 0 if process is None else _proportional_bytes(process.pid)
    news.put((_proportional_bytes(), apart, threading.active_count()))


def _optimizer(size: str) -> AMSGrad:
    return AMSGrad([nn.Parameter(torch.zeros(shape)) for shape in SHAPES[size]], lr=1e-6)


def _train(news: Any, addresses: Any, start: Any, stop: Any, size: str, rank: int, ranks: int, holder: str) -> None:
    torch.set_num_threads(1)
    # What torch loads at its first backward and step is not the exchange's.
    _backward(_optimizer("44K"))
    process = HolderProcess() if rank == 0 and holder == "process" else None
    if process is not None:
        _settled(process)
    _report(news, process)
    start.wait()
    optimizer = _optimizer(size)
    if rank == 0:
        engine, _ = hold(optimizer, ranks, lambda told: [addresses.put(told) for _ in range(ranks - 1)], process)
        engine.worker.pull()
    else:
        engine = work_for(addresses.get(), rank, ranks, optimizer)
    for _ in range(3):
        _backward(optimizer)
        engine.worker.step(0)
        optimizer.zero_grad()
        time.sleep(0.2)
    _report(news, process)
    stop.wait()
    _report(news, process)
    threading.Event().wait()


def _backward(optimizer: torch.optim.Optimizer) -> None:
    loss: Any = torch.stack([p.sum() for group in optimizer.param_groups for p in group["params"]]).sum()
    loss.backward()


if __name__ == "__main__":
    main()
