"""Updates a second of a holder in shards, with ranks that only push.

Run ``python -m benchmarks.shards``. The numbers of shards take turns, round by round, so that what else the machine
does meets all of them; the load is printed beside each. Every rank but rank 0 pushes the same gradient as fast as it is
answered, and does not look into it, so that what is measured is the holder: its update, and its copies of the
parameters.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from typing import Any

import torch

from benchmarks.processes import SHAPES, hold, optimizer_of, push
from benchmarks.record import save
from lightning_async.shards.process import ShardProcess


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["30M", "100M"], choices=list(SHAPES))
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pushing", type=int, default=2, help="ranks that push")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    print("parameters  shards  updates/s  load")
    for size in arguments.sizes:
        rates: dict[int, list[float]] = {shards: [] for shards in arguments.shards}
        for _ in range(arguments.rounds):
            for shards in arguments.shards:
                rate = measure(size, shards, arguments.pushing, arguments.seconds)
                load = os.getloadavg()[0]
                rates[shards].append(rate)
                print(f"{size:>10} {shards:>7} {rate:>10.2f} {load:>5.1f}", flush=True)
                found.append({"size": size, "shards": shards, "updates_per_second": rate, "load": load})
        first = statistics.median(rates[arguments.shards[0]])
        for shards, own in rates.items():
            print(f"{size:>10} {shards:>7} {statistics.median(own):>10.2f}  {statistics.median(own) / first:.2f} times")
    save("shards", vars(arguments), found)


def measure(size: str, shards: int, pushing: int, seconds: float) -> float:
    """Updates a second, once every rank has made some."""
    context = multiprocessing.get_context("spawn")
    addresses, rates = context.SimpleQueue(), context.SimpleQueue()
    ranks = 1 + pushing
    holding = context.Process(target=_hold, args=(addresses, rates, size, shards, ranks, seconds))
    others = [context.Process(target=_push, args=(addresses, size, rank, ranks)) for rank in range(1, ranks)]
    for process in (holding, *others):
        process.start()
    rate = float(rates.get())
    for process in (*others, holding):
        process.kill()
        process.join()
    return rate


def _hold(addresses: Any, rates: Any, size: str, shards: int, ranks: int, seconds: float) -> None:
    torch.set_num_threads(1)
    processes = [ShardProcess(shard) for shard in range(1, shards)]
    told = [addresses.put] * (ranks - 1)
    _, stats = hold(optimizer_of(SHAPES[size]), ranks, lambda found: [tell(found) for tell in told], shards=processes)
    while stats.updates < 2 * ranks:
        time.sleep(0.05)
    before, began = stats.updates, time.perf_counter()
    time.sleep(seconds)
    updates, took_s = stats.updates - before, time.perf_counter() - began
    rates.put(updates / took_s)
    time.sleep(60.0)


def _push(addresses: Any, size: str, rank: int, ranks: int) -> None:
    push(addresses.get(), rank, ranks, SHAPES[size], reject_nonfinite=False)


if __name__ == "__main__":
    main()
