"""What serving the other ranks costs rank 0's own training, and what a holder in a process of its own changes.

Run ``python -m benchmarks.rank0``. Rank 0 trains LeNet-5, a real forward and backward and some pure Python in each step
as Lightning's loop has it, while other processes push ready gradients at a given rate. Arrangements:

- ``thread``: the holder is in rank 0's process (``holder="thread"``);
- ``thread-5ms``: the same with Python's own switch interval in place of half a millisecond;
- ``process``: it has a process of its own, and rank 0 is one of its workers in shared memory (``holder="process"``);
- ``apart``: the others push to a holder that is none of rank 0's business. What is lost here is lost to the cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.processes import SHAPES, hold, optimizer_of, push
from benchmarks.record import save
from lightning_async.exchange.remote_service import HolderProcess
from lightning_async.exchange.worker import Worker
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime import threads
from recipes.models import LeNet5

SHAPES_OF_LENET5 = SHAPES["44K"]
ARRANGEMENTS = ["thread", "thread-5ms", "process", "apart"]
BATCH = 64
# Of an empty loop, about.
_TURNS_PER_MS = 30_000


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=3, help="ranks that push")
    parser.add_argument(
        "--pauses-ms", type=float, nargs="+", default=[50.0, 10.0, 2.0, 0.0], help="of each of them between two pushes"
    )
    parser.add_argument("--python-ms", type=float, default=1.5, help="pure Python in each of rank 0's steps")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3, help="taken in turns; medians are shown")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    print("pause, ms  holder   rank 0, steps/s  of alone  others, pushes/s")
    for pause_ms in arguments.pauses_ms:
        kinds = [(name, arguments.others) for name in ARRANGEMENTS]
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ["alone", *ARRANGEMENTS]}
        for _ in range(arguments.repeats):
            for name, others in [("thread", 0), *kinds]:
                rate = measure(name, others, pause_ms, arguments.python_ms, arguments.seconds)
                rates[name if others else "alone"].append(rate)
        medians = {name: sorted(of_name)[len(of_name) // 2] for name, of_name in rates.items()}
        for name, (steps, pushes) in medians.items():
            share = steps / medians["alone"][0]
            print(f"{pause_ms:>9.0f}  {name:<8} {steps:>15.0f} {share:>9.2f} {pushes:>17.0f}", flush=True)
            row = {"pause_ms": pause_ms, "holder": name, "steps_per_second": steps, "of_alone": share}
            found.append(row | {"pushes_per_second": pushes})
    save("rank0", vars(arguments), found)


def measure(arrangement: str, others: int, pause_ms: float, python_ms: float, seconds: float) -> tuple[float, float]:
    """Rank 0's steps and the others' pushes per second."""
    context = multiprocessing.get_context("spawn")
    addresses, counts, results = context.SimpleQueue(), context.SimpleQueue(), context.SimpleQueue()
    begun = context.Event()
    processes: list[Any] = []

    def start(target: Any, *arguments: Any) -> None:
        processes.append(context.Process(target=target, args=arguments))
        processes[-1].start()

    def start_others(address: str) -> None:
        for rank in range(1, others + 1):
            start(push, address, rank, others + 1, SHAPES_OF_LENET5, pause_ms / 1e3)

    apart = arrangement == "apart"
    if apart:
        start(_hold, addresses, counts, begun, others + 1, seconds)
        start_others(addresses.get())
        counts.get()
    start(_train, arrangement, 1 if apart else others + 1, addresses, results, begun, python_ms, seconds)
    if others and not apart:
        start_others(addresses.get())
    steps, pushes = results.get()
    if apart:
        pushes = counts.get()
    for process in reversed(processes):
        process.kill()
        process.join()
    return float(steps), float(pushes)


def _hold(addresses: Any, counts: Any, begun: Any, ranks: int, seconds: float) -> None:
    torch.set_num_threads(1)
    _, stats = hold(optimizer_of(SHAPES_OF_LENET5), ranks, addresses.put)
    _wait_for_others(stats)
    counts.put(None)
    begun.wait()
    before, started = stats.updates, time.perf_counter()
    time.sleep(seconds)
    counts.put((stats.updates - before) / (time.perf_counter() - started))
    threading.Event().wait()


def _train(
    arrangement: str, ranks: int, addresses: Any, results: Any, begun: Any, python_ms: float, seconds: float
) -> None:
    torch.set_num_threads(1)
    if arrangement == "thread-5ms":
        threads.SWITCH_INTERVAL_S = sys.getswitchinterval()
    net = LeNet5()
    optimizer = AMSGrad(net.parameters(), lr=1e-6)
    engine, stats = hold(
        optimizer, ranks, addresses.put, HolderProcess() if arrangement == "process" and ranks > 1 else None
    )
    engine.worker.pull()
    _wait_for_others(stats)
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    _steps_in(1.0, net, engine.worker, images, labels, python_ms)
    begun.set()
    served, started = stats.updates - stats.updates_by_rank[0], time.perf_counter()
    steps = _steps_in(seconds, net, engine.worker, images, labels, python_ms)
    elapsed = time.perf_counter() - started
    pushes = stats.updates - stats.updates_by_rank[0] - served
    results.put((steps / elapsed, pushes / elapsed))
    threading.Event().wait()


def _wait_for_others(stats: RunStats) -> None:
    while min(list(stats.updates_by_rank.values())[1:], default=5) < 5:
        time.sleep(0.01)


def _steps_in(seconds: float, net: nn.Module, worker: Worker, images: Tensor, labels: Tensor, python_ms: float) -> int:
    steps, turns = 0, int(python_ms * _TURNS_PER_MS)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        # Work, not waiting: a thread that takes the interpreter's lock delays it.
        for _ in range(turns):
            pass
        net.zero_grad()
        loss: Any = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        worker.step(0)
        steps += 1
    return steps


if __name__ == "__main__":
    main()
