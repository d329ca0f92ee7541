"""What the demo's trainings measured, and its tables. Pure, apart from reading the records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_async.monitoring.record import RunRecord
from lightning_async.monitoring.tables import text_table

__all__ = ["TEST_NAME", "THRESHOLD", "Run", "comparison_table", "rank_table", "seconds_to"]

# Validation accuracy whose time is taken.
THRESHOLD = 0.95
TEST_NAME = "test.json"
_METRIC = "val/acc"


@dataclass(frozen=True)
class Run:
    """What one training run measured.

    Args:
        strategy: the name that the run was started with.
        batches: training batches over all ranks.
        seconds: duration of training, validations included.
        threshold: the validation accuracy to reach.
        seconds_to_threshold: from the start of training until validation reached it; `None` if never.
        test_accuracy: accuracy on the test set after training.
        stats: the strategy's statistics; empty if it keeps none.
    """

    strategy: str
    batches: int
    seconds: float
    threshold: float
    seconds_to_threshold: float | None
    test_accuracy: float
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batches_per_second(self) -> float:
        """Training batches over all ranks per second of training."""
        return self.batches / self.seconds

    @classmethod
    def read(cls, strategy: str, folder: Path, threshold: float = THRESHOLD) -> Run:
        """Reads what a run has left.

        Args:
            strategy: the name that the run was started with.
            folder: with the record that compare's `RunRecorder` has written, and the metrics of the test.
            threshold: the validation accuracy to reach.
        """
        record = RunRecord.read(folder / "record.json")
        last = record.evaluations[-1]
        return cls(
            strategy=strategy,
            batches=last.batches,
            seconds=last.wall_seconds,
            threshold=threshold,
            seconds_to_threshold=seconds_to(record, threshold),
            test_accuracy=json.loads((folder / TEST_NAME).read_text())["test/acc"],
            stats=record.stats,
        )


def seconds_to(record: RunRecord, threshold: float) -> float | None:
    """From the start of training to the first validation that reached an accuracy; None if there was none."""
    return next((point.wall_seconds for point, accuracy in record.curve(_METRIC) if accuracy >= threshold), None)


def rank_table(stats: Mapping[str, Any]) -> str:
    """Show what each rank contributed to an asynchronous run.

    Args:
        stats: the strategy's statistics.
    """
    batches: dict[int, int] = stats["batches_by_rank"]
    total = sum(batches.values())
    rows = []
    for rank, own in batches.items():
        staleness: dict[int, int] = stats["staleness_by_rank"].get(rank, {})
        updates = sum(staleness.values())
        mean = sum(age * count for age, count in staleness.items()) / updates if updates else 0.0
        rows.append(
            [
                str(rank),
                str(own),
                f"{own / total:.1%}" if total else "-",
                f"{mean:.2f}",
                str(max(staleness, default=0)),
                f"{stats['wait_seconds_by_rank'].get(rank, 0.0):.2f}",
            ]
        )
    headings = ["rank", "batches", "share", "mean staleness", "max staleness", "waited, s"]
    return "What each rank did\n" + text_table(headings, rows)


def comparison_table(run: Run, baseline: Run) -> str:
    """Show two runs side by side.

    Args:
        run: the run that the ratios speak for: more than 1x means that it is faster.
        baseline: the run to compare with.
    """
    times = (run.seconds_to_threshold, baseline.seconds_to_threshold)
    shown = [f"{seconds:.1f} s" if seconds is not None else "not reached" for seconds in times]
    ratio = "-" if times[0] is None or times[1] is None else f"{times[1] / times[0]:.2f}x"
    rows = [
        [
            "training batches per second",
            f"{run.batches_per_second:.1f}",
            f"{baseline.batches_per_second:.1f}",
            f"{run.batches_per_second / baseline.batches_per_second:.2f}x",
        ],
        [f"time to {run.threshold:.0%} validation accuracy", *shown, ratio],
        [
            "training time",
            f"{run.seconds:.1f} s",
            f"{baseline.seconds:.1f} s",
            f"{baseline.seconds / run.seconds:.2f}x",
        ],
        ["test accuracy", f"{run.test_accuracy:.2%}", f"{baseline.test_accuracy:.2%}", ""],
    ]
    return "Side by side\n" + text_table(["", run.strategy, baseline.strategy, "ratio"], rows)
