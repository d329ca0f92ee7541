"""What asynchrony does, in numbers, collected at the holder."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from lightning_async.holder.types import Update
from lightning_async.monitoring.cpu_use import CpuUse

__all__ = ["RunStats", "quantile", "staleness_numbers", "staleness_text"]

# Enough for a median within a few percent, whatever the run's length.
_STEPS_KEPT = 1001


class RunStats:
    """Statistics of a run, as ``trainer.strategy.stats`` on rank 0, during and after fit.

    Args:
        workers: number of ranks.
        clock: tells the seconds that training takes, and pickles; the process's by default.

    Attributes:
        updates: updates applied, over all optimizers.
        ranks: number of ranks in the run.
        version: the version that the last of them made.
        staleness: staleness -> number of applied updates.
        staleness_by_rank: the same for each rank.
        updates_by_rank: rank -> updates applied.
        batches_by_rank: rank -> batches computed.
        wait_seconds_by_rank: rank -> seconds its training loop spent in push and pull: transport, update and barrier.
        parked_seconds_by_rank: rank -> the part of it in which the barrier held its gradient back.
        host_by_rank: rank -> name of its host, once the ranks have met after some training.
        cores_by_rank: rank -> cores that its process may run on.
        cores_used_by_rank: rank -> cores that it keeps busy on average while it trains.
        all_reduce_seconds: seconds that an all-reduce of the parameters takes on these ranks, once they have met.
        wire_bytes: bytes of gradients and parameters that went over a network.
        dropped: pushes discarded as too stale (``on_stale="drop"``).
        rejected: pushes that were not applied since the gradient had NaN or infinity in it.
        rejected_by_rank: the same for each rank.
        refused: connections and requests that were refused.
        evicted: ranks that were taken out of the run, in that order, where it goes on without them.
        joined: ranks that have joined the run since it began, in that order.
        train_seconds: seconds of training until the last validation, or other stop; see `seconds_so_far`.
    """

    def __init__(self, workers: int, clock: Callable[[], float] | None = None) -> None:
        # A signal's handler may look at the statistics while its own thread counts.
        self._lock = threading.RLock()
        self._clock = clock
        self.updates = 0
        self.ranks = workers
        self.version = 0
        self.staleness: Counter[int] = Counter()
        self.staleness_by_rank: dict[int, Counter[int]] = {rank: Counter() for rank in range(workers)}
        self.updates_by_rank: dict[int, int] = dict.fromkeys(range(workers), 0)
        self.batches_by_rank: dict[int, int] = dict.fromkeys(range(workers), 0)
        self.wait_seconds_by_rank: dict[int, float] = dict.fromkeys(range(workers), 0.0)
        self.parked_seconds_by_rank: dict[int, float] = dict.fromkeys(range(workers), 0.0)
        self.host_by_rank: dict[int, str] = dict.fromkeys(range(workers), "")
        self.cores_by_rank: dict[int, int] = dict.fromkeys(range(workers), 0)
        self.cores_used_by_rank: dict[int, float] = dict.fromkeys(range(workers), 0.0)
        self.all_reduce_seconds = 0.0
        self.wire_bytes = 0
        self.dropped = 0
        self.rejected = 0
        self.rejected_by_rank: dict[int, int] = dict.fromkeys(range(workers), 0)
        self.refused = 0
        self.evicted: list[int] = []
        self.joined: list[int] = []
        self.train_seconds = 0.0
        self._segment_started: float | None = None
        # Of each rank: when its last update was recorded, and how long the barrier had held that one back.
        self._last: dict[int, tuple[float, float]] = {}
        self._steps: dict[int, deque[float]] = {rank: deque(maxlen=_STEPS_KEPT) for rank in range(workers)}
        self._update_ns = 0

    def start_segment(self) -> None:
        """Training begins, or goes on after a validation."""
        with self._lock:
            self._segment_started = self._now()
            self._last.clear()

    def end_segment(self) -> None:
        """All ranks have met: what comes now is not training."""
        with self._lock:
            if self._segment_started is not None:
                self.train_seconds += self._now() - self._segment_started
                self._segment_started = None

    def seconds_so_far(self) -> float:
        """Seconds of training until now, validation not counted."""
        with self._lock:
            return self._train_seconds()

    def record(self, update: Update) -> None:
        """Counts an applied, dropped or rejected push."""
        worker, now = update.push.worker, update.at_ns / 1e9
        with self._lock:
            self._time_step(worker, now, update)
            self.batches_by_rank[worker] += update.push.batches
            self.wait_seconds_by_rank[worker] += update.push.waited_s
            self.parked_seconds_by_rank[worker] += update.parked_s
            self.wire_bytes += update.push.wire_bytes
            if update.applied:
                self._update_ns += update.took_ns
                self.updates += 1
                self.version = update.version
                self.updates_by_rank[worker] += 1
                self.staleness[update.staleness] += 1
                self.staleness_by_rank[worker][update.staleness] += 1
            elif update.rejected:
                self.rejected += 1
                self.rejected_by_rank[worker] += 1
            else:
                self.dropped += 1

    def _time_step(self, worker: int, now: float, update: Update) -> None:
        # From update to update a rank computes, and waits twice: for the answer to the first and, parked, before the
        # second. A worker tells how long it waited with its next push, the parked time before the first included.
        if worker in self._last:
            before, parked_s = self._last[worker]
            self._steps[worker].append(max(0.0, now - before - update.push.waited_s + parked_s - update.parked_s))
        self._last[worker] = (now, update.parked_s)

    def evict(self, rank: int) -> None:
        """Notes that a rank is out of the run."""
        with self._lock:
            self.evicted.append(rank)
            self.ranks -= 1
            self._last.pop(rank, None)

    def join(self, rank: int) -> None:
        """Notes that a rank is in the run that was out of it, or is new."""
        with self._lock:
            self.joined.append(rank)
            self.ranks += 1
            self._last.pop(rank, None)
            self._steps.setdefault(rank, deque(maxlen=_STEPS_KEPT))
            self.staleness_by_rank.setdefault(rank, Counter())
            for counts in (self.updates_by_rank, self.batches_by_rank, self.cores_by_rank, self.rejected_by_rank):
                counts.setdefault(rank, 0)
            for seconds in (self.wait_seconds_by_rank, self.parked_seconds_by_rank, self.cores_used_by_rank):
                seconds.setdefault(rank, 0.0)
            self.host_by_rank.setdefault(rank, "")

    def is_in_run(self, rank: int) -> bool:
        """Whether a rank is in the run, of those that it began with or that have joined since."""
        with self._lock:
            return rank in self.updates_by_rank and self.evicted.count(rank) <= self.joined.count(rank)

    def note_cpu_use(self, ranks: Mapping[int, CpuUse]) -> None:
        """Notes what each rank uses of its host, where all have met."""
        with self._lock:
            for rank, use in ranks.items():
                self.host_by_rank[rank], self.cores_by_rank[rank] = use.host, use.cores
                self.cores_used_by_rank[rank] = use.used

    @property
    def seconds_an_update(self) -> float:
        """Seconds that the holder has worked on a gradient, on average."""
        return self._update_ns / 1e9 / max(self.updates, 1)

    @property
    def busiest_host(self) -> float:
        """Part of its cores that the ranks keep busy on the host where it is largest; 0.0 if that is not known."""
        hosts: Counter[str] = Counter()
        cores: Counter[str] = Counter()
        with self._lock:
            for rank, host in self.host_by_rank.items():
                hosts[host] += self.cores_used_by_rank[rank]  # type: ignore[assignment]  # floats add up as well
                cores[host] = max(cores[host], self.cores_by_rank[rank])
        return max((min(1.0, used / cores[host]) for host, used in hosts.items() if cores[host]), default=0.0)

    def step_seconds(self, rank: int) -> list[float]:
        """Seconds that ``rank`` took to compute each of its latest updates (at most 1001), without waiting."""
        with self._lock:
            return list(self._steps[rank])

    def refuse(self) -> None:
        """Counts a refused connection or request."""
        with self._lock:
            self.refused += 1

    def __getstate__(self) -> dict[str, Any]:
        # The statistics travel from a spawned rank 0 to the process that started it; the lock does not.
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def counts(self) -> dict[str, Any]:
        """A copy of the counters, in little time."""
        with self._lock:
            return {
                "updates": self.updates,
                "ranks": self.ranks,
                "staleness": dict(self.staleness),
                "staleness_by_rank": {rank: dict(counts) for rank, counts in self.staleness_by_rank.items()},
                "updates_by_rank": dict(self.updates_by_rank),
                "batches_by_rank": dict(self.batches_by_rank),
                "wait_seconds_by_rank": dict(self.wait_seconds_by_rank),
                "parked_seconds_by_rank": dict(self.parked_seconds_by_rank),
                "host_by_rank": dict(self.host_by_rank),
                "cores_by_rank": dict(self.cores_by_rank),
                "cores_used_by_rank": dict(self.cores_used_by_rank),
                "all_reduce_seconds": self.all_reduce_seconds,
                "wire_bytes": self.wire_bytes,
                "dropped": self.dropped,
                "rejected": self.rejected,
                "rejected_by_rank": dict(self.rejected_by_rank),
                "refused": self.refused,
                "evicted": list(self.evicted),
                "joined": list(self.joined),
                "train_seconds": self._train_seconds(),
            }

    def as_dict(self) -> dict[str, Any]:
        """The counters and each rank's median step, 0.0 where it is unknown; JSON can hold it."""
        # The holder waits for this lock, so nothing is sorted under it.
        medians = {rank: median(self.step_seconds(rank) or [0.0]) for rank in self._steps}
        return {**self.counts(), "median_step_seconds_by_rank": medians}

    def summary(self) -> dict[str, float]:
        """The run in a few numbers; those of one rank end in ``_rank_r``. Empty if there was no update."""
        stats = self.as_dict()
        updates, seconds, ranks = stats["updates"], stats["train_seconds"], stats["updates_by_rank"]
        if updates == 0:
            return {}
        waited = stats["wait_seconds_by_rank"]
        summary = {
            "updates": float(updates),
            **staleness_numbers(Counter(stats["staleness"])),
            "updates_per_second": updates / max(seconds, 1e-9),
            "wait_fraction": sum(waited.values()) / max(seconds * len(ranks), 1e-9),
            "train_seconds": seconds,
            "dropped": float(stats["dropped"]),
            "rejected": float(stats["rejected"]),
            "refused": float(stats["refused"]),
        }
        if stats["wire_bytes"]:
            summary["wire_bytes_per_update"] = stats["wire_bytes"] / updates
        for rank, count in ranks.items():
            summary[f"updates_rank_{rank}"] = float(count)
            summary[f"share_rank_{rank}"] = count / updates
            summary[f"wait_fraction_rank_{rank}"] = waited[rank] / max(seconds, 1e-9)
            summary[f"median_step_seconds_rank_{rank}"] = stats["median_step_seconds_by_rank"][rank]
        return summary

    def _train_seconds(self) -> float:
        running = 0.0 if self._segment_started is None else self._now() - self._segment_started
        return self.train_seconds + running

    def _now(self) -> float:
        return time.perf_counter() if self._clock is None else self._clock()


def staleness_numbers(counts: Counter[int]) -> dict[str, float]:
    """Mean, 95th percentile and maximum of the staleness, by name.

    Examples:
        >>> staleness_numbers(Counter({0: 1, 3: 2}))
        {'staleness_mean': 2.0, 'staleness_p95': 3.0, 'staleness_max': 3.0}
    """
    return {
        "staleness_mean": sum(age * count for age, count in counts.items()) / counts.total(),
        "staleness_p95": float(quantile(counts, 0.95)),
        "staleness_max": float(max(counts)),
    }


def quantile(counts: Counter[int], fraction: float) -> int:
    """The smallest value that at least ``fraction`` of the counted values do not exceed.

    Examples:
        >>> quantile(Counter({0: 19, 10: 1}), 0.95), quantile(Counter({0: 18, 10: 2}), 0.95)
        (0, 10)
    """
    needed = fraction * counts.total()
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return max(counts)


def staleness_text(counts: Mapping[int, int]) -> str:
    """Mean, 95th percentile and maximum of the staleness, as tables show them.

    Examples:
        >>> staleness_text({0: 1, 3: 2}), staleness_text({})
        ('2.0 / 3 / 3', '-')
    """
    if not counts:
        return "-"
    mean, p95, largest = staleness_numbers(Counter(counts)).values()
    return f"{mean:.1f} / {p95:.0f} / {largest:.0f}"
