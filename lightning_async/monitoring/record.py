"""What a run leaves on disk for its report: one JSON file of bounded size.

Written by `callbacks.py`, read by the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_async.monitoring.stats import RunStats

__all__ = ["RECORD_NAME", "Point", "RecordError", "RunRecord", "Series"]

RECORD_NAME = "async_run.json"
_FORMAT = "lightning_async run"
_FORMAT_VERSION = 1


class RecordError(ValueError):
    """A file that is no record of a run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Point:
    """The run at one moment; counts are from its start on.

    Args:
        seconds: of training, validation not counted.
        wall_seconds: since the start, validation counted.
        updates: applied so far.
        staleness_sum: over these updates.
        loss: mean training loss of rank 0's batches since the last point; None if it is unknown.
    """

    seconds: float
    wall_seconds: float
    updates: int
    staleness_sum: int
    loss: float | None


class Series:
    """Points at even distances of time; when there are too many, every other one is left out from then on.

    Args:
        limit: the most points.
        every_s: seconds between two points at first.

    Examples:
        >>> series = Series(limit=4, every_s=1.0)
        >>> for second in range(9):
        ...     if series.due(float(second)):
        ...         series.add(Point(second, float(second), second, 0, None))
        >>> [point.updates for point in series.points]
        [1, 3, 5, 7]
    """

    def __init__(self, limit: int = 1000, every_s: float = 0.05) -> None:
        self.points: list[Point] = []
        self._limit = limit
        self._every_s = every_s
        self._last_s = 0.0

    def due(self, wall_seconds: float) -> bool:
        """Whether the next point is due."""
        return wall_seconds - self._last_s >= self._every_s

    def add(self, point: Point) -> None:
        """Keeps a point."""
        self.points.append(point)
        self._last_s = point.wall_seconds
        if len(self.points) > self._limit:
            self.points = self.points[::2]
            self._every_s *= 2.0


@dataclass
class RunRecord:
    """A run, as its report needs it.

    Args:
        configuration: of the strategy.
        stats: ``RunStats.as_dict()``.
        step_seconds: for each rank the seconds of its latest steps, at most 1001.
        series: the run over time.
        finished: whether the fit came to its end.
        written_at: time of day, ISO 8601.
        about: what else to say of the run: name -> value.
    """

    configuration: dict[str, Any]
    stats: dict[str, Any]
    step_seconds: list[list[float]]
    series: list[Point]
    finished: bool
    written_at: str
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, configuration: Mapping[str, Any], stats: RunStats, series: Series, **rest: Any) -> RunRecord:
        """A record of what is known now."""
        numbers = stats.as_dict()
        steps = [[round(step, 6) for step in stats.step_seconds(rank)] for rank in numbers["updates_by_rank"]]
        return cls(dict(configuration), numbers, steps, list(series.points), **rest)

    def write(self, path: Path) -> None:
        """Writes the record; a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(self)}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(whole), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """Reads the record of a run.

        Args:
            run_dir: the run's folder, or the record itself.

        Raises:
            RecordError: if there is none, or another kind of file.
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
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{path} is not JSON: {error}") from error
        if not isinstance(whole, dict) or whole.pop("format", None) != _FORMAT:
            raise RecordError(f"{path} is not a record of a run by lightning_async")
        if (version := whole.pop("format_version", None)) != _FORMAT_VERSION:
            raise RecordError(f"{path} has format version {version}; this lightning_async reads {_FORMAT_VERSION}")
        try:
            series = [Point(**point) for point in whole.pop("series")]
            record = cls(**{**whole, "stats": _with_numbers(whole["stats"]), "series": series})
            record._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{path} is damaged: {error!r}") from error
        return record

    def _check(self) -> None:
        known = RunStats(workers=0).as_dict()
        ranks = set(range(len(self.step_seconds)))
        for name, value in known.items():
            found = self.stats[name]
            if isinstance(value, dict) != isinstance(found, dict):
                raise ValueError(f"stats.{name} is {found!r}")
            if name.endswith("_by_rank") and found.keys() != ranks:
                raise ValueError(f"stats.{name} is of other ranks than step_seconds")
        for name in ("max_staleness", "on_stale", "batches"):
            self.configuration[name]


def _with_numbers(value: Any) -> Any:
    # JSON's keys are strings; those of ranks and ages are numbers.
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: _with_numbers(inner) for key, inner in value.items()}
    return value
