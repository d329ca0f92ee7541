"""What the runs recorded, summed up over the seeds. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_async.cli.compare.plan import PlannedVariant
from lightning_async.monitoring.record import RunRecord

__all__ = ["Estimate", "Result", "Summary", "estimate", "seconds_to", "summarize"]

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Result:
    """How one planned run ended: with a record, or with a reason why there is none.

    Args:
        variant: what was trained.
        seed: with which seed.
        record: what was measured.
        failure: what went wrong.
    """

    variant: PlannedVariant
    seed: int
    record: RunRecord | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Estimate:
    """A value measured with several seeds.

    Args:
        mean: over the seeds.
        spread: standard deviation of one seed's value (with n-1); `None` with one seed.
        count: how many seeds have the value.
    """

    mean: float
    spread: float | None
    count: int


@dataclass(frozen=True)
class Summary:
    """One variant, over its seeds; `None` stands for what was not measured.

    Args:
        variant: which.
        records: of the finished runs, by seed.
        failures: why the other runs have none, by seed.
        metric: the metric after training.
        best_metric: its best value at any validation.
        loss: the validation loss after training.
        train_loss: mean training loss of the last epoch.
        epochs: epochs trained.
        updates: updates of the parameters, over all ranks.
        batches_per_second: training batches over all ranks per second of training.
        epoch_seconds: seconds of training per epoch, without validation.
        staleness: mean staleness of the updates.
        target_seconds: seconds of training until the metric reached the target, over the runs that reached it.
    """

    variant: PlannedVariant
    records: Mapping[int, RunRecord]
    failures: Mapping[int, str]
    metric: Estimate | None
    best_metric: Estimate | None
    loss: Estimate | None
    train_loss: Estimate | None
    epochs: Estimate | None
    updates: Estimate | None
    batches_per_second: Estimate | None
    epoch_seconds: Estimate | None
    staleness: Estimate | None
    target_seconds: Estimate | None

    @property
    def runs(self) -> int:
        """How many runs were tried."""
        return len(self.records) + len(self.failures)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Sum up what several seeds gave.

    Args:
        values: one for each seed, `None` where there is none.

    Returns:
        Mean and spread of those that there are; `None` if there are none.

    Examples:
        >>> estimate([1.0, 3.0, None])
        Estimate(mean=2.0, spread=1.4142135623730951, count=2)
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    if not all(map(math.isfinite, known)):
        # A run that has diverged must show.
        return Estimate(math.nan, None, len(known))
    return Estimate(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def seconds_to(record: RunRecord, metric: str, target: float, mode: Mode) -> float | None:
    """When a run reached a value.

    Args:
        record: of the run.
        metric: name of the metric.
        target: the value to reach.
        mode: "max" if more is better, "min" if less.

    Returns:
        Seconds of training, without validation, up to the first validation with the value or a better one;
        `None` if there was none.
    """
    for evaluation, value in record.curve(metric):
        if value >= target if mode == "max" else value <= target:
            return evaluation.seconds
    return None


def summarize(results: Sequence[Result], metric: str, mode: Mode, loss: str, target: float | None) -> list[Summary]:
    """Sum up each variant over its seeds.

    Args:
        results: of all runs.
        metric: the metric to judge by.
        mode: "max" if more of it is better, "min" if less.
        loss: name of the validation loss.
        target: value of the metric whose time is wanted.

    Returns:
        One summary for each variant, in the order in which they first appear.
    """
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.variant.name, []).append(result)
    return [_summary(group, metric, mode, loss, target) for group in by_name.values()]


def _summary(group: Sequence[Result], metric: str, mode: Mode, loss: str, target: float | None) -> Summary:
    best = max if mode == "max" else min
    records = {
        result.seed: result.record for result in group if result.record is not None and result.record.evaluations
    }
    ends = [(record, record.evaluations[-1]) for record in records.values()]
    curves = [[value for _, value in record.curve(metric)] for record in records.values()]
    return Summary(
        variant=group[0].variant,
        records=records,
        failures={
            result.seed: result.failure or "nothing was recorded" for result in group if result.seed not in records
        },
        metric=estimate(record.last(metric) for record in records.values()),
        best_metric=estimate(best(curve) if curve else None for curve in curves),
        loss=estimate(record.last(loss) for record in records.values()),
        train_loss=estimate(end.train_loss for _, end in ends),
        epochs=estimate(end.epoch for _, end in ends),
        updates=estimate(end.updates for _, end in ends),
        batches_per_second=estimate(end.batches / end.seconds for _, end in ends),
        epoch_seconds=estimate(end.seconds / end.epoch for _, end in ends),
        staleness=estimate(record.mean_staleness() for record in records.values()),
        target_seconds=None
        if target is None
        else estimate(seconds_to(record, metric, target, mode) for record in records.values()),
    )
