"""What threads and one pass do for the holder of a large model, beside what the same memory traffic takes.

Run ``python -m benchmarks.holder``. Three tables, each measured in turns within one run:

- *threads*: an update and a copy of the parameters, with the holder's threads; beside them the same bytes by as many
  threads, without arithmetic (the floor).
- *one pass*: processor time of K pushes that wait, one after the other and in one pass.
- *workers*: updates a second of processes that push at once and compute nothing, with one pass and without; the
  holder goes from one to the other and back while they push.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.processes import SHAPES, Shapes, hold, optimizer_of, push
from benchmarks.record import save
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.team import Team
from lightning_async.holder.types import Push, WaitingPush
from lightning_async.runtime.cores import usable_cores
from lightning_async.runtime.failure import FailureLatch


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="11.2M", choices=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8], metavar="K", help="pushes that wait")
    parser.add_argument("--workers", type=int, nargs="+", default=[8], help="0 leaves the processes out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn of the workers")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    shapes, rounds = SHAPES[arguments.size], arguments.rounds
    found = []
    print(f"{arguments.size} parameters, {usable_cores()} cores, load {os.getloadavg()[0]:.1f}")
    print("threads  update and copy, ms  the same traffic, ms  ratio")
    for threads in arguments.threads:
        update_s, floor_s = with_threads(shapes, threads, rounds)
        found.append({"threads": threads, "update_s": update_s, "floor_s": floor_s})
        print(f"{threads:>7} {1e3 * update_s:>20.1f} {1e3 * floor_s:>21.1f} {update_s / floor_s:>6.2f}", flush=True)
    print("waiting  one after the other, ms of a core  one pass, ms of a core  times as fast")
    for waiting in arguments.k:
        each_s, once_s = waiting_pushes(shapes, waiting, rounds)
        found.append({"waiting": waiting, "each_s": each_s, "once_s": once_s})
        print(f"{waiting:>7} {1e3 * each_s:>34.1f} {1e3 * once_s:>23.1f} {each_s / once_s:>14.2f}", flush=True)
    print(
        "workers  one after the other, updates/s  one pass, updates/s  times as many  the same per s of its core  load"
    )
    for workers in arguments.workers if any(arguments.workers) else ():
        (each, each_core), (once, once_core) = updates_per_second(shapes, workers, rounds, arguments.seconds)
        load = os.getloadavg()[0]
        row = {"workers": workers, "each": each, "once": once, "each_core": each_core, "once_core": once_core}
        found.append(row | {"load": load})
        print(
            f"{workers:>7} {each:>31.1f} {once:>20.1f} {once / each:>14.2f} "
            f"{f'{each_core:.1f}, {once_core:.1f}':>18} {once_core / each_core:>8.2f} {load:>5.1f}",
            flush=True,
        )
    save("holder", vars(arguments), found)


class Bench:
    """A holder, and workers that push a ready gradient each.

    Args:
        shapes: of the parameters.
        threads: the holder's.
        workers: how many.
    """

    def __init__(self, shapes: Shapes, threads: int = 1, workers: int = 1) -> None:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer, layout = AMSGrad(parameters, lr=1e-3), FlatLayout([parameters])
        barrier = StalenessBarrier(None)
        self._groups = HyperparamLayout(optimizer).read(optimizer.param_groups)
        self.holder = Holder(layout, layout.buffer(), [optimizer], barrier, FailureLatch(), threads=threads)
        self._gradients = [layout.buffer().normal_() for _ in range(workers)]
        self._views: list[list[Tensor | None]] = [[*layout.views(gradient, 0)] for gradient in self._gradients]
        self._outs = [layout.buffer() for _ in range(workers)]
        self._versions = [self.holder.try_pull(worker, out) or 0 for worker, out in enumerate(self._outs)]
        self.one_by_one()

    def one_by_one(self) -> None:
        """Serves each worker's push, one after the other."""
        for worker, out in enumerate(self._outs):
            self.holder.try_push(self._push(worker))
            self._versions[worker] = self.holder.try_pull(worker, out) or 0

    def at_once(self) -> None:
        """Serves all workers' pushes in one pass, if the model is large."""
        if not self.holder.joins_pushes:
            self.one_by_one()
            return
        waiting = [WaitingPush(self._push(worker), out, lambda: True) for worker, out in enumerate(self._outs)]
        self._versions = [version or 0 for _, version in self.holder.push_together(waiting)]

    def _push(self, worker: int) -> Push:
        gradient, version = self._gradients[worker], self._versions[worker]
        return Push(worker, 0, version, self._views[worker], self._groups, flat=gradient)


def with_threads(shapes: Shapes, threads: int, rounds: int) -> tuple[float, float]:
    """Seconds of an update and a copy by so many threads, and of the same bytes without arithmetic."""
    bench, team = Bench(shapes, threads), Team(threads)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    *state, gradient, out = [torch.zeros(numel) for _ in range(6)]

    def move(part: slice) -> None:
        for one in state:
            # In place, as the kernel writes what it has read.
            one[part].mul_(1.0)
        gradient[part].sum()
        out[part].copy_(state[0][part])

    update_s, floor_s = in_turns([bench.one_by_one, lambda: team.over(numel, move)], rounds, time.perf_counter)
    bench.holder.close()
    team.close()
    return update_s, floor_s


def waiting_pushes(shapes: Shapes, waiting: int, rounds: int) -> tuple[float, float]:
    """Seconds of a core for an update: with ``waiting`` pushes one after the other, and in one pass."""
    bench = Bench(shapes, workers=waiting)
    each_s, once_s = in_turns([bench.one_by_one, bench.at_once], rounds, time.thread_time)
    return each_s / waiting, once_s / waiting


def in_turns(calls: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """The median seconds of each call, which take turns."""
    durations: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, of_call in zip(calls, durations, strict=True):
            started = clock()
            call()
            if number:
                of_call.append(clock() - started)
    return [statistics.median(of_call) for of_call in durations]


def updates_per_second(
    shapes: Shapes, workers: int, rounds: int, seconds: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Updates that processes get out of one holder, without one pass and with it: a second, and a second of its core.

    On a machine whose cores are shared with others the second is what can be compared.
    """
    # Forked ones do not import torch again, which takes minutes on a busy machine.
    context = multiprocessing.get_context("fork")
    # Nor what torch imports with the first optimizer.
    optimizer_of(SHAPES["44K"])
    ready, results = context.SimpleQueue(), context.SimpleQueue()
    processes = [context.Process(target=_hold, args=(ready, results, shapes, workers, rounds, seconds))]
    processes[0].start()
    address = ready.get()
    for rank in range(1, workers + 1):
        processes.append(context.Process(target=push, args=(address, rank, workers + 1, shapes)))
        processes[-1].start()
    each, once = results.get()
    # The workers first: they would complain of a lost holder.
    for process in reversed(processes):
        process.kill()
        process.join()
    return each, once


def _hold(ready: Any, results: Any, shapes: Shapes, workers: int, rounds: int, seconds: float) -> None:
    torch.set_num_threads(1)
    _, stats = hold(optimizer_of(shapes), workers + 1, ready.put, transport="shm")
    while min(list(stats.updates_by_rank.values())[1:]) < 2:
        time.sleep(0.01)
    taken = {False: [0.0, 0.0, 0.0], True: [0.0, 0.0, 0.0]}
    for _ in range(rounds):
        for joins, of_mode in taken.items():
            with mock.patch.object(Holder, "joins_pushes", joins):
                # What is under way in the other mode has ended.
                time.sleep(0.3)
                before = (stats.updates, time.perf_counter(), time.process_time())
                time.sleep(seconds)
                after = (stats.updates, time.perf_counter(), time.process_time())
                for place in range(3):
                    of_mode[place] += after[place] - before[place]
    results.put([(updates / wall_s, updates / core_s) for updates, wall_s, core_s in taken.values()])
    threading.Event().wait()


if __name__ == "__main__":
    main()
