"""How many updates a second the holder takes: workers that push a ready gradient at once and compute nothing.

Run ``python -m benchmarks.ceiling``. Each worker is a process of its own on this host; rank 0 only holds. Beside each
rate stands how long an update takes, over what the fused kernel and one copy take in one thread, measured before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from typing import Any

import torch

from benchmarks.kernel import floor_seconds
from benchmarks.processes import SHAPES, Shapes, hold, optimizer_of, push
from benchmarks.record import save


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["44K", "11.2M"], choices=list(SHAPES))
    parser.add_argument("--wire-dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--k", type=int, default=1, metavar="K", help="gradients that make an update")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    torch.set_num_threads(1)
    print("parameters transport workers  gradients/s  us/gradient  over kernel + copy")
    for size in arguments.sizes:
        floor_s = sum(floor_seconds(SHAPES[size]))
        print(f"{size:>10} {'alone':>9} {'':>7} {1 / floor_s:>12.0f} {1e6 * floor_s:>12.0f} {1:>19.2f}", flush=True)
        for transport in arguments.transports:
            for workers in arguments.workers:
                rate = gradients_per_second(
                    SHAPES[size], workers, transport, arguments.seconds, arguments.wire_dtype, arguments.k
                )
                ratio = 1 / (rate * floor_s)
                row = {"size": size, "transport": transport, "workers": workers, "updates_per_second": rate}
                found.append(row | {"floor_s": floor_s, "over_floor": ratio})
                print(
                    f"{size:>10} {transport:>9} {workers:>7} {rate:>12.0f} {1e6 / rate:>12.0f} {ratio:>19.2f}",
                    flush=True,
                )
    name = "ceiling" if arguments.wire_dtype == "fp32" else f"ceiling_{arguments.wire_dtype}"
    save(name if arguments.k == 1 else f"{name}_k{arguments.k}", vars(arguments), found)


def gradients_per_second(
    shapes: Shapes, workers: int, transport: str, seconds: float, wire_dtype: str = "fp32", k: int = 1
) -> float:
    """Gradients a second that ``workers`` processes get out of one holder, after a second of warming up."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.SimpleQueue(), context.SimpleQueue()
    processes = [
        context.Process(target=_hold, args=(ready, results, shapes, workers, transport, wire_dtype, seconds, k))
    ]
    processes[0].start()
    address = ready.get()
    for rank in range(1, workers + 1):
        processes.append(context.Process(target=push, args=(address, rank, workers + 1, shapes)))
        processes[-1].start()
    rate = float(results.get())
    # The workers first: they would complain of a lost holder.
    for process in reversed(processes):
        process.kill()
        process.join()
    return rate


def _hold(
    ready: Any, results: Any, shapes: Shapes, workers: int, transport: Any, wire_dtype: Any, seconds: float, k: int
) -> None:
    torch.set_num_threads(1)
    _, stats = hold(
        optimizer_of(shapes),
        workers + 1,
        ready.put,
        transport=transport,
        wire_dtype=wire_dtype,
        parameter_wire_dtype=wire_dtype,
        gradients_per_update=k,
    )
    while min(list(stats.updates_by_rank.values())[1:]) < 5:
        time.sleep(0.01)
    time.sleep(1.0)
    before, started = stats.updates, time.perf_counter()
    time.sleep(seconds)
    results.put((stats.updates - before) / (time.perf_counter() - started))
    threading.Event().wait()


if __name__ == "__main__":
    main()
