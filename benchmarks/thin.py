"""Updates a second over a thin link, for each form of payloads on the wire, beside what the link allows.

Run ``python -m benchmarks.thin`` as root, on Linux: the holder and the workers are on two hosts made of network
namespaces, with a rate limit by tbf between them. Each worker pushes a ready gradient again and again. A full-duplex
link is used up when every update's gradient and parameters take all of one direction's bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from typing import Any

import torch

from benchmarks.network import Link
from benchmarks.processes import SHAPES, hold, optimizer_of, push
from benchmarks.record import save


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="11.2M", choices=list(SHAPES))
    parser.add_argument("--megabits", type=float, default=100.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--wires", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--turns", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    print("wire  workers  updates/s  MB/update  of the link")
    for _ in range(arguments.turns):
        for workers in arguments.workers:
            for wire in arguments.wires:
                row = measure(arguments.size, workers, wire, arguments.megabits, arguments.seconds)
                found.append(row)
                print(
                    f"{wire:>4} {workers:>8} {row['updates_per_second']:>10.2f} {row['mb_per_update']:>10.1f}"
                    f" {row['of_link']:>12.2f}",
                    flush=True,
                )
    save("thin", vars(arguments), found)


def measure(size: str, workers: int, wire: str, megabits: float, seconds: float) -> dict[str, Any]:
    """A holder on one host and workers on the other."""
    link = Link()
    link.limit(megabits)
    context = multiprocessing.get_context("spawn")
    ready, results = context.SimpleQueue(), context.SimpleQueue()
    holder = context.Process(target=_hold, args=(ready, results, size, workers, wire, seconds))
    link.a.run(holder.start)
    addresses = ready.get()
    processes = [
        context.Process(target=push, args=(addresses, rank, workers + 1, SHAPES[size]))
        for rank in range(1, workers + 1)
    ]
    for process in processes:
        link.b.run(process.start)
    results.get()
    before, started = link.carried_bytes(), time.perf_counter()
    rate, wire_bytes = results.get()
    sent, received = (after - first for after, first in zip(link.carried_bytes(), before, strict=True))
    passed_s = time.perf_counter() - started
    for process in (*processes, holder):
        process.kill()
        process.join()
    link.close()
    return {
        "wire": wire,
        "workers": workers,
        "updates_per_second": rate,
        "mb_per_update": wire_bytes / 1e6,
        # All bytes on the wire, headers too, of what both directions can carry.
        "of_link": (sent + received) * 8 / passed_s / (2 * megabits * 1e6),
    }


def _hold(ready: Any, results: Any, size: str, workers: int, wire: Any, seconds: float) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"transport": "tcp", "wire_dtype": wire, "parameter_wire_dtype": wire}
    _, stats = hold(optimizer_of(SHAPES[size]), workers + 1, ready.put, host=Link.ADDRESS, **options)
    while min(list(stats.updates_by_rank.values())[1:]) < 1:
        time.sleep(0.01)
    results.put(None)
    updates, carried, started = stats.updates, stats.wire_bytes, time.perf_counter()
    # To an update's end, or the fraction of one would count.
    while time.perf_counter() - started < seconds:
        time.sleep(0.01)
    last = stats.updates
    while stats.updates == last and time.perf_counter() - started < 2 * seconds:
        time.sleep(0.001)
    made, passed_s = stats.updates - updates, time.perf_counter() - started
    results.put((made / passed_s, (stats.wire_bytes - carried) / max(made, 1)))
    time.sleep(3600.0)


if __name__ == "__main__":
    main()
