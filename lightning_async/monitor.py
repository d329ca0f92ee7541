"""What asynchrony does, in numbers: collected at the holder, logged on rank 0.

Below `strategy.py`, which owns the statistics and calls the logger. `RunStats` knows no Lightning; `log_metrics` talks
to any Lightning logger.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

from lightning_async.holder import Update

__all__ = ["MetricsLogger", "RunStats"]


class RunStats:
    """Statistics of a run, as ``trainer.strategy.stats`` on rank 0, during and after fit.

    Args:
        workers: number of ranks.

    Attributes:
        updates: updates applied, over all optimizers.
        staleness: staleness -> number of applied updates.
        staleness_by_rank: the same for each rank.
        updates_by_rank: rank -> updates applied.
        batches_by_rank: rank -> batches computed.
        wait_seconds_by_rank: rank -> seconds its training loop spent in push and pull: transport, update and barrier.
        parked_seconds_by_rank: rank -> the part of it in which the barrier held its gradient back.
        dropped: pushes discarded as too stale (``on_stale="drop"``).
        rejected: connections and requests that were refused.
        evicted: ranks that were taken out of the run.
    """

    def __init__(self, workers: int) -> None:
        self._lock = threading.Lock()
        self.updates = 0
        self.staleness: Counter[int] = Counter()
        self.staleness_by_rank: dict[int, Counter[int]] = {rank: Counter() for rank in range(workers)}
        self.updates_by_rank: dict[int, int] = dict.fromkeys(range(workers), 0)
        self.batches_by_rank: dict[int, int] = dict.fromkeys(range(workers), 0)
        self.wait_seconds_by_rank: dict[int, float] = dict.fromkeys(range(workers), 0.0)
        self.parked_seconds_by_rank: dict[int, float] = dict.fromkeys(range(workers), 0.0)
        self.dropped = 0
        self.rejected = 0
        self.evicted: list[int] = []

    def record(self, update: Update) -> None:
        """Counts an applied or dropped push."""
        worker = update.push.worker
        with self._lock:
            self.batches_by_rank[worker] += update.push.tickets
            self.wait_seconds_by_rank[worker] += update.push.waited_s
            self.parked_seconds_by_rank[worker] += update.parked_s
            if update.applied:
                self.updates += 1
                self.updates_by_rank[worker] += 1
                self.staleness[update.staleness] += 1
                self.staleness_by_rank[worker][update.staleness] += 1
            else:
                self.dropped += 1

    def refuse(self) -> None:
        """Counts a refused connection or request."""
        with self._lock:
            self.rejected += 1

    def __getstate__(self) -> dict[str, Any]:
        # The statistics travel from a spawned rank 0 to the process that started it; the lock does not.
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def as_dict(self) -> dict[str, Any]:
        """A copy that JSON can hold."""
        with self._lock:
            return {
                "updates": self.updates,
                "staleness": dict(self.staleness),
                "staleness_by_rank": {rank: dict(counts) for rank, counts in self.staleness_by_rank.items()},
                "updates_by_rank": dict(self.updates_by_rank),
                "batches_by_rank": dict(self.batches_by_rank),
                "wait_seconds_by_rank": dict(self.wait_seconds_by_rank),
                "parked_seconds_by_rank": dict(self.parked_seconds_by_rank),
                "dropped": self.dropped,
                "rejected": self.rejected,
                "evicted": list(self.evicted),
            }


class _Logger(Protocol):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


class MetricsLogger:
    """Logs the ``async/`` metrics: what has happened since they were last logged.

    Args:
        stats: the run's statistics.
    """

    def __init__(self, stats: RunStats) -> None:
        self._stats = stats
        self._seen = stats.as_dict()
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves the time since the last logging out of the rates: validation is not training."""
        self._since = time.perf_counter()

    def log(self, loggers: Iterable[_Logger], version: int, step: int) -> None:
        """Writes the metrics to ``loggers`` at ``step``; nothing if no update came in since."""
        now, stats = time.perf_counter(), self._stats.as_dict()
        updates = stats["updates"] - self._seen["updates"]
        if updates == 0:
            return
        metrics = self._metrics(stats, version, updates, now - self._since)
        self._seen, self._since = stats, now
        for logger in loggers:
            logger.log_metrics(metrics, step=step)

    def _metrics(self, stats: dict[str, Any], version: int, updates: int, seconds: float) -> dict[str, float]:
        staleness = Counter(stats["staleness"])
        staleness.subtract(self._seen["staleness"])
        waited = sum(stats["wait_seconds_by_rank"].values()) - sum(self._seen["wait_seconds_by_rank"].values())
        ranks = stats["updates_by_rank"]
        metrics = {
            "async/version": float(version),
            "async/staleness_mean": sum(age * count for age, count in staleness.items()) / updates,
            "async/staleness_p95": float(_quantile(staleness, 0.95)),
            "async/staleness_max": float(max(age for age, count in staleness.items() if count)),
            "async/updates_per_second": updates / seconds,
            "async/wait_fraction": waited / (seconds * len(ranks)),
            "async/dropped": float(stats["dropped"]),
            "async/rejected": float(stats["rejected"]),
        }
        for rank, count in ranks.items():
            metrics[f"async/share_rank_{rank}"] = (count - self._seen["updates_by_rank"][rank]) / updates
        return metrics


def _quantile(counts: Counter[int], fraction: float) -> int:
    """The smallest value that at least ``fraction`` of the counted values do not exceed."""
    needed = fraction * counts.total()
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return max(counts)
