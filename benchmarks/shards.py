"""Updates a second of a holder in shards, with ranks that only push.

Run ``python -m benchmarks.shards``. The numbers of shards take turns, round by round, so that what else the machine
does meets all of them; the load is printed beside each, and the processor time that the busiest of the holder's
processes takes for an update: where each has a core of its own, that is what bounds the rate. Every rank but rank 0
pushes the same gradient as fast as it is answered, and does not look into it, so that what is measured is the holder:
its update, and its copies of the parameters.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import SHAPES, hold, optimizer_of, push
from benchmarks.record import save
from benchmarks.shard_hosts import measure_hosts
from lightning_async.shards.process import ShardProcess


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["30M", "100M"], choices=list(SHAPES))
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pushing", type=int, default=2, help="ranks that push")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--hosts", type=int, default=1, help="hosts on a network, with a rank each (root, iproute2)")
    parser.add_argument("--megabits", type=float, default=1000.0, help="rate of each host's interface")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.hosts > 1:
        over_hosts(arguments)
        return
    found = []
    print("parameters  shards  updates/s  busiest process, ms/update  load")
    for size in arguments.sizes:
        measured: dict[int, list[tuple[float, float]]] = {shards: [] for shards in arguments.shards}
        for _ in range(arguments.rounds):
            for shards in arguments.shards:
                rate, busiest_ms = measure(size, shards, arguments.pushing, arguments.seconds)
                load = os.getloadavg()[0]
                measured[shards].append((rate, busiest_ms))
                print(f"{size:>10} {shards:>7} {rate:>10.2f} {busiest_ms:>27.1f} {load:>5.1f}", flush=True)
                row = {"size": size, "shards": shards, "updates_per_second": rate, "busiest_ms": busiest_ms}
                found.append(row | {"load": load})
        medians = {
            shards: [statistics.median(values) for values in zip(*own, strict=True)] for shards, own in measured.items()
        }
        first_rate, first_ms = medians[arguments.shards[0]]
        for shards, (rate, busiest_ms) in medians.items():
            print(
                f"{size}, {shards} shards: {rate:.2f} updates/s ({rate / first_rate:.2f} times), "
                f"busiest process {busiest_ms:.1f} ms/update ({first_ms / busiest_ms:.2f} times less)"
            )
    save("shards", vars(arguments), found)


def over_hosts(arguments: argparse.Namespace) -> None:
    """Measures shards that are spread over hosts, and prints."""
    found = []
    print("parameters  hosts  shards  updates/s  MB/update, busiest host  MB/update, rank 0's  load")
    for size in arguments.sizes:
        for _ in range(arguments.rounds):
            for shards in arguments.shards:
                own = measure_hosts(size, shards, arguments.hosts, arguments.megabits, arguments.seconds)
                load = os.getloadavg()[0]
                print(
                    f"{size:>10} {arguments.hosts:>6} {shards:>7} {own.updates_per_s:>10.2f} {own.busiest_mb:>24.1f} "
                    f"{own.first_mb:>20.1f} {load:>5.1f}",
                    flush=True,
                )
                found.append({"size": size, "hosts": arguments.hosts, "shards": shards, "load": load} | own._asdict())
    save("shards-hosts", vars(arguments), found)


def measure(size: str, shards: int, pushing: int, seconds: float) -> tuple[float, float]:
    """Updates a second, once every rank has made some; and the busiest process's milliseconds for each."""
    context = multiprocessing.get_context("spawn")
    addresses, rates = context.SimpleQueue(), context.SimpleQueue()
    ranks = 1 + pushing
    holding = context.Process(target=_hold, args=(addresses, rates, size, shards, ranks, seconds))
    others = [context.Process(target=_push, args=(addresses, size, rank, ranks)) for rank in range(1, ranks)]
    for process in (holding, *others):
        process.start()
    rate, busiest_ms = rates.get()
    for process in (*others, holding):
        process.kill()
        process.join()
    return rate, busiest_ms


def _hold(addresses: Any, rates: Any, size: str, shards: int, ranks: int, seconds: float) -> None:
    torch.set_num_threads(1)
    processes = [ShardProcess(shard) for shard in range(1, shards)]
    told = [addresses.put] * (ranks - 1)
    _, stats = hold(optimizer_of(SHAPES[size]), ranks, lambda found: [tell(found) for tell in told], shards=processes)
    while stats.updates < 2 * ranks:
        time.sleep(0.05)
    pids = [os.getpid(), *(process.pid for process in processes)]
    before, busy_before, began = stats.updates, [*map(_processor_s, pids)], time.perf_counter()
    time.sleep(seconds)
    updates, took_s = stats.updates - before, time.perf_counter() - began
    busiest_s = max(_processor_s(pid) - earlier for pid, earlier in zip(pids, busy_before, strict=True))
    rates.put((updates / took_s, 1e3 * busiest_s / updates))
    time.sleep(60.0)


def _processor_s(pid: int) -> float:
    """Processor time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _push(addresses: Any, size: str, rank: int, ranks: int) -> None:
    push(addresses.get(), rank, ranks, SHAPES[size], reject_nonfinite=False)


if __name__ == "__main__":
    main()
