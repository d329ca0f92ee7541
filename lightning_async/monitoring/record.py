"""What a run leaves on disk, with any strategy: one JSON file of bounded size.

`AsyncMonitor` and `compare` write it; the report and the tables of `compare` are made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_async.monitoring.series import Evaluation, Point
from lightning_async.monitoring.stats import RunStats
from lightning_async.monitoring.versioned import Format, RecordError

__all__ = ["RECORD_NAME", "RecordError", "RunRecord"]

RECORD_NAME = "async_run.json"
_FORMAT = Format("lightning_async run", 4, "a record of a run by lightning_async", "Train the run anew.")

# Statistics that records of older versions do not have.
_ADDED_LATER = ("wire_bytes",)


@dataclass
class RunRecord:
    """A run.

    Args:
        strategy: name of the strategy's class.
        ranks: their number.
        max_epochs: as the Trainer has it.
        finished: whether the fit came to its end.
        written_at: time of day, ISO 8601.
        evaluations: the run at its validations and the ends of its epochs, at most 2000.
        configuration: of the asynchronous strategy; empty with another one.
        stats: ``RunStats.as_dict()``; empty if the strategy keeps none.
        step_seconds: for each rank the seconds of its latest steps, at most 1001; empty without ``stats``.
        series: the run at even distances of time, at most 1000 points.
        about: what else to say of the run: name -> value.
    """

    strategy: str
    ranks: int
    max_epochs: int | None
    finished: bool
    written_at: str
    evaluations: Sequence[Evaluation] = ()
    configuration: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    step_seconds: Sequence[Sequence[float]] = ()
    series: Sequence[Point] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def curve(self, metric: str) -> list[tuple[Evaluation, float]]:
        """The evaluations that have the metric, each with its value."""
        return [(point, point.metrics[metric]) for point in self.evaluations if metric in point.metrics]

    def last(self, metric: str) -> float | None:
        """The metric's last value, or None if it was never logged."""
        curve = self.curve(metric)
        return curve[-1][1] if curve else None

    def mean_staleness(self) -> float | None:
        """Mean staleness of the applied updates, or None if the strategy keeps no statistics of it."""
        counts: dict[int, int] = self.stats.get("staleness", {})
        return sum(age * count for age, count in counts.items()) / sum(counts.values()) if counts else None

    def write(self, path: Path) -> None:
        """Writes the record; a reader sees the old file or the new one."""
        lists = {"evaluations": list(map(asdict, self.evaluations)), "series": list(map(asdict, self.series))}
        _FORMAT.write(path, {**vars(self), **lists})

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """Reads the record of a run.

        Args:
            run_dir: the run's folder, or the record itself.

        Raises:
            RecordError: if there is none, or another kind of file, or one of another version.
        """
        if not run_dir.exists():
            raise RecordError(f"{run_dir} does not exist")
        path = run_dir / RECORD_NAME if run_dir.is_dir() else run_dir
        if not path.exists():
            hint = "train with callbacks=[lightning_async.AsyncMonitor()] to have one"
            below = sorted(run_dir.glob(f"**/{RECORD_NAME}")) if run_dir.is_dir() else []
            if below:
                hint = f"did you mean {below[-1].parent}?"
            raise RecordError(f"there is no record of a run at {path}; {hint}")
        whole = _FORMAT.read(path)
        try:
            record = cls(
                **{
                    **whole,
                    "evaluations": [Evaluation(**evaluation) for evaluation in whole["evaluations"]],
                    "series": [Point(**point) for point in whole["series"]],
                    "stats": _with_numbers(whole["stats"]),
                }
            )
            record._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{path} is damaged: {error!r}") from error
        return record

    def _check(self) -> None:
        if not isinstance(self.configuration, dict):
            raise ValueError(f"configuration is {self.configuration!r}")
        if self.configuration:
            for name in ("max_staleness", "on_stale", "batches", "gradients_per_update"):
                self.configuration[name]
        if not (self.stats or self.step_seconds or self.configuration):
            return
        ranks = set(range(len(self.step_seconds)))
        for name, value in RunStats(workers=0).as_dict().items():
            if name in _ADDED_LATER and name not in self.stats:
                continue
            found = self.stats[name]
            if isinstance(value, dict) != isinstance(found, dict):
                raise ValueError(f"stats.{name} is {found!r}")
            if name.endswith("_by_rank") and found.keys() != ranks:
                raise ValueError(f"stats.{name} is of other ranks than step_seconds")


def _with_numbers(value: Any) -> Any:
    # JSON's keys are strings; those of ranks and ages are numbers.
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: _with_numbers(inner) for key, inner in value.items()}
    return value
