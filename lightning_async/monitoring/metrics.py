"""The ``async/`` metrics of the loggers: a row for each stretch of a run that is long enough, and the run's summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lightning_async.monitoring.stats import RunStats, staleness_numbers

__all__ = ["MetricsLogger", "MetricsWriter", "is_worth_a_row"]


class MetricsWriter(Protocol):
    """Where metrics go: one logger, and what it can show."""

    def configure(self, configuration: dict[str, Any]) -> None:
        """Notes how the run is set up."""

    def log(self, metrics: dict[str, float], staleness: Counter[int], step: int) -> None:
        """Writes metrics of a stretch of the run, and the staleness counts since the row before."""

    def summarize(self, summary: dict[str, float], metrics: dict[str, float], step: int) -> None:
        """Notes the run's final numbers, and what the metrics are over the whole run."""


def is_worth_a_row(steps: int, every: int) -> bool:
    """Whether ``steps`` steps are enough for rates and staleness to mean something: half of what a row usually covers.

    Args:
        steps: of the loggers' x-axis since the last row.
        every: the Trainer's ``log_every_n_steps``.

    Examples:
        >>> is_worth_a_row(25, every=50), is_worth_a_row(24, every=50), is_worth_a_row(1, every=1)
        (True, False, True)
    """
    return 2 * steps >= every


class MetricsLogger:
    """Logs the ``async/`` metrics: what has happened since they were last logged.

    A stretch that is too short for a row belongs to the next one. At the end of the fit it belongs to the one before:
    the last row then covers both, and its counters are the run's.

    Args:
        stats: the run's statistics.
        writers: where the metrics go.
        every: the Trainer's ``log_every_n_steps``.
        more: tells further metrics, of the present.
        ranks: at most so many ranks have metrics of their own; None for all of them.
    """

    def __init__(
        self,
        stats: RunStats,
        writers: Sequence[MetricsWriter],
        every: int,
        more: Callable[[], Mapping[str, float]] = dict,
        ranks: int | None = None,
    ) -> None:
        self._stats = stats
        self._writers = writers
        self._every = every
        self._more = more
        self._ranks = ranks
        # Counts at the last row, at the one before and at the beginning.
        self._seen = self._seen_before = self._first = stats.counts()
        self._step: int | None = None
        self._finished = False

    def configure(self, configuration: dict[str, Any]) -> None:
        """Writes how the run is set up: before anything else, and again where "auto" has chosen."""
        for writer in self._writers:
            writer.configure(configuration)

    def begin(self, step: int) -> None:
        """Notes where the fit stands on the loggers' x-axis when training begins; nothing later."""
        if self._step is None:
            self._step = step

    def log(self, version: int, step: int, epoch: int) -> None:
        """Writes the metrics at ``step``; nothing if no update came in since, or too few steps were made.

        Args:
            version: the version that this rank has read.
            step: the x-axis.
            epoch: goes into the row, as into every row that Lightning writes: loggers rely on it.
        """
        if is_worth_a_row(step - (self._step or 0), self._every):
            self._log(self._seen, version, step, epoch)

    def finish(self, version: int, step: int, epoch: int) -> None:
        """Writes what is left for a row, and the run's final numbers; nothing if there was no update.

        Args:
            version: the version that this rank has read.
            step: the x-axis.
            epoch: goes into the row.
        """
        if self._finished:
            return
        self._finished = True
        enough = is_worth_a_row(step - (self._step or 0), self._every)
        self._log(self._seen if enough else self._seen_before, version, step, epoch)
        summary, stats = self._stats.summary(), self._stats.counts()
        if summary:
            version = max(version, self._stats.version)
            metrics = {**_metrics(stats, self._first, version, self._ranks), **self._more()}
            for writer in self._writers:
                writer.summarize(summary, metrics, step)

    def _log(self, since: dict[str, Any], version: int, step: int, epoch: int) -> None:
        stats = self._stats.counts()
        # The holder may be ahead of what this rank has read: its updates are counted here, and the last is in no other
        # row.
        version = max(version, self._stats.version)
        if stats["updates"] == self._seen["updates"]:
            return
        metrics = {**_metrics(stats, since, version, self._ranks), **self._more()}
        staleness = Counter(stats["staleness"]) - Counter(self._seen["staleness"])
        self._seen_before, self._seen, self._step = self._seen, stats, step
        for writer in self._writers:
            # A copy for each: a logger may take something out of its row.
            writer.log({**metrics, "epoch": epoch}, staleness, step)


def _metrics(stats: dict[str, Any], since: dict[str, Any], version: int, own: int | None) -> dict[str, float]:
    """The metrics of the stretch between two counts; validation is not training, and not in its seconds."""
    seconds = max(stats["train_seconds"] - since["train_seconds"], 1e-9)
    waited = sum(stats["wait_seconds_by_rank"].values()) - sum(since["wait_seconds_by_rank"].values())
    staleness = Counter(stats["staleness"]) - Counter(since["staleness"])
    ranks, updates = stats["updates_by_rank"], staleness.total()
    metrics = {
        "async/version": float(version),
        **{f"async/{name}": value for name, value in staleness_numbers(staleness).items()},
        "async/updates_per_second": updates / seconds,
        "async/wait_fraction": waited / (seconds * len(ranks)),
        "async/ranks": float(stats["ranks"]),
        "async/dropped": float(stats["dropped"]),
        "async/rejected": float(stats["rejected"]),
        "async/refused": float(stats["refused"]),
    }
    if stats["wire_bytes"]:
        metrics["async/wire_bytes_per_update"] = (stats["wire_bytes"] - since["wire_bytes"]) / updates
    for rank, count in [*ranks.items()][:own]:
        new = count - since["updates_by_rank"].get(rank, 0)
        metrics[f"async/share_rank_{rank}"] = new / updates
        metrics[f"async/updates_per_second_rank_{rank}"] = new / seconds
    return metrics
