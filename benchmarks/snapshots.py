"""What snapshots in the background cost: updates a second with and without them, and how long workers wait for one.

Run ``python -m benchmarks.snapshots``. Ranks of one speed sleep for a step and exchange the gradient of a model; runs
with ``snapshot_every_s`` take turns with runs without. A worker's gap is the time between two of its updates: the
longest ones are shown, those while rank 0 takes a snapshot, while it is written, and all others of the same run, which
tell what the machine does by itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_async
from benchmarks.emulated import LENET5_PARAMETERS, QUIET, RESNET18_PARAMETERS, EmulatedModule, Step, hush_lightning
from benchmarks.record import save
from lightning_async.strategies.snapshot_writer import SnapshotWriter

MODELS = {"44 K": LENET5_PARAMETERS, "11.2 M": RESNET18_PARAMETERS}
_WARM_UP_S = 1.0

Span = tuple[float, float]


class TimedTrainer(Trainer):
    """Notes when snapshots are taken."""

    taken: list[Span]

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        started = time.monotonic()
        super().save_checkpoint(*args, **kwargs)
        self.taken.append((started, time.monotonic()))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--holders", nargs="+", default=["thread", "process"], choices=["thread", "process"])
    parser.add_argument("--every", type=float, default=2.0, help="snapshot_every_s")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=12.0, help="about how long each run trains")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, taken in turns; medians are shown")
    arguments = parser.parse_args()
    found = []
    for model in arguments.models:
        for holder in arguments.holders:
            runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
            for _ in range(arguments.repeats):
                for with_snapshots, done in runs.items():
                    done.append(_in_process(MODELS[model], holder, arguments.every * with_snapshots, arguments))
            found.append({"model": model, "holder": holder, **compare(runs[False], runs[True])})
            print(f"{model}, holder={holder}: {found[-1]}", flush=True)
            save("snapshots", vars(arguments), found)


def compare(without: Sequence[dict[str, Any]], having: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs; of gaps too, each run's longest counting once."""

    def median(runs: Sequence[dict[str, Any]], name: str) -> float:
        return round(float(statistics.median(run[name] for run in runs)), 1)

    names = ("taking_ms", "writing_ms", "gap_taking_ms", "gap_writing_ms", "gap_else_ms")
    return {
        "updates_per_second": median(having, "updates_per_second"),
        "updates_per_second_without": median(without, "updates_per_second"),
        "gap_ms_without": median(without, "gap_else_ms"),
        "snapshots": sum(run["snapshots"] for run in having),
        **{name: median(having, name) for name in names},
    }


def longest_gaps(updates: Sequence[tuple[int, float]], taken: Sequence[Span], written: Sequence[Span]) -> list[float]:
    """The longest gap of a worker that overlaps with one taken, with one written and not taken, and of all others.

    Args:
        updates: worker and time of each, in rising order of times.
        taken: when snapshots were taken.
        written: when they were written.

    Examples:
        >>> longest_gaps([(1, 0.0), (2, 0.5), (1, 2.0), (1, 3.0), (1, 3.5)], [(0.1, 0.2)], [(2.5, 2.6)])
        [2.0, 1.0, 0.5]
    """
    last: dict[int, float] = {}
    longest = [0.0, 0.0, 0.0]
    for worker, at in updates:
        before = last.get(worker, at)
        last[worker] = at
        kinds = (any(before < stop and start < at for start, stop in spans) for spans in (taken, written))
        kind = next((place for place, overlaps in enumerate(kinds) if overlaps), 2)
        longest[kind] = max(longest[kind], at - before)
    return longest


def _in_process(parameters: int, holder: str, every_s: float, arguments: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(queue, parameters, holder, every_s, arguments))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"a measurement failed with exit code {process.exitcode}")
    return dict(queue.get())


def _measure(queue: Any, parameters: int, holder: Any, every_s: float, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: Any = multiprocessing.get_context("fork").SimpleQueue()
    updates: list[tuple[int, float]] = []
    written: list[Span] = []
    untyped: Any = SnapshotWriter
    write = untyped._write

    def timed_write(writer: SnapshotWriter, checkpoint: dict[str, Any]) -> None:
        started = time.monotonic()
        write(writer, checkpoint)
        written.append((started, time.monotonic()))

    # In this process only.
    untyped._write = timed_write

    class Reporting(EmulatedModule):
        def on_train_end(self) -> None:
            if self.global_rank == 0:
                trainer: Any = self.trainer
                begun = updates[0][1] + _WARM_UP_S
                others = [(worker, at) for worker, at in updates if worker > 0 and at > begun]
                gaps = longest_gaps(others, trainer.taken, written)
                counted = [at for _, at in updates if at > begun]
                results.put(
                    {
                        "updates_per_second": len(counted) / (counted[-1] - begun),
                        "snapshots": len(written),
                        "taking_ms": _median_ms(trainer.taken),
                        "writing_ms": _median_ms(written),
                        "gap_taking_ms": 1e3 * gaps[0],
                        "gap_writing_ms": 1e3 * gaps[1],
                        "gap_else_ms": 1e3 * gaps[2],
                    }
                )

    hush_lightning()
    strategy = lightning_async.AsyncAMSGradStrategy(
        start_method="fork", summary=False, holder=holder, snapshot_every_s=every_s or None
    )
    strategy.observers.append(lambda update, tickets: updates.append((update.push.worker, update.at_ns / 1e9)))
    batches = int(arguments.seconds / arguments.step_ms * 1e3 * arguments.ranks)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        trainer = TimedTrainer(
            strategy=strategy,
            accelerator="cpu",
            devices=arguments.ranks,
            max_epochs=1,
            default_root_dir=folder,
            **QUIET,
        )
        trainer.taken = []
        module = Reporting(parameters, [Step(sleep_s=arguments.step_ms / 1e3)] * arguments.ranks)
        trainer.fit(module, DataLoader(TensorDataset(torch.zeros(batches, 1)), batch_size=1))
    queue.put(results.get())


def _median_ms(spans: Sequence[Span]) -> float:
    return 1e3 * statistics.median([stop - start for start, stop in spans] or [0.0])


if __name__ == "__main__":
    main()
