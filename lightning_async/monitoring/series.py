"""A run over time: points at even distances of time, and evaluations. Both are bounded in number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["Evaluation", "Evaluations", "Point", "Series"]


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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The run at a validation or the end of an epoch; counts are from the start of fit on.

    Args:
        epoch: epochs so far, a fraction within one.
        updates: of the parameters, over all ranks.
        batches: training batches, over all ranks.
        seconds: of training, without validation.
        wall_seconds: since the start of training, with validation.
        train_loss: mean of what ``training_step`` returned since the evaluation before, over all ranks; None if it
            returned no loss.
        metrics: all that is logged, as rank 0 has it.
    """

    epoch: float
    updates: int
    batches: int
    seconds: float
    wall_seconds: float
    train_loss: float | None
    metrics: Mapping[str, float]


class Evaluations:
    """Evaluations in their order; the first and the latest are always there.

    A validation and the end of an epoch are one evaluation if no batch lies between them. When there are too many,
    every other one is left out from then on.

    Args:
        limit: the most evaluations; an even number.

    Examples:
        >>> evaluations = Evaluations(limit=4)
        >>> for epoch in range(1, 8):
        ...     evaluations.add(Evaluation(epoch, 8 * epoch, 8 * epoch, 1.0 * epoch, 1.0 * epoch, None, {}))
        >>> [evaluation.epoch for evaluation in evaluations.kept]
        [1, 3, 5, 7]
    """

    def __init__(self, limit: int = 2000) -> None:
        self.kept: list[Evaluation] = []
        self._limit = limit
        self._stride = 1
        self._count = 0

    def add(self, evaluation: Evaluation) -> None:
        """Keeps an evaluation, at the latest until the next one comes."""
        if self.kept and self.kept[-1].batches == evaluation.batches:
            before = self.kept[-1]
            metrics = {**before.metrics, **evaluation.metrics}
            self.kept[-1] = replace(evaluation, train_loss=before.train_loss, metrics=metrics)
            return
        if (self._count - 1) % self._stride:
            # It was there as the latest only.
            self.kept.pop()
        self.kept.append(evaluation)
        self._count += 1
        if len(self.kept) > self._limit:
            self.kept = self.kept[::2]
            self._stride *= 2
