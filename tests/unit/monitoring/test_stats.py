"""The numbers that the user sees are those of the updates."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest

from lightning_async.holder.types import Push, Update
from lightning_async.monitoring import stats as monitor
from lightning_async.monitoring.stats import RunStats


def update(
    worker: int,
    staleness: int,
    *,
    applied: bool = True,
    rejected: bool = False,
    waited_s: float = 0.0,
    parked_s: float = 0.0,
) -> Update:
    push = Push(worker, 0, version_read=0, gradients=[], groups=[], tickets=(range(2),), samples=8, waited_s=waited_s)
    # By the test's clock, where it has one.
    now_ns = round(monitor.time.perf_counter() * 1e9)
    return Update(push, 0, staleness, applied, parked_s, at_ns=now_ns, rejected=rejected)


def test_updates_are_counted_by_rank_and_staleness() -> None:
    stats = RunStats(workers=3)
    for worker, staleness in [(0, 0), (1, 2), (1, 2), (1, 0)]:
        stats.record(update(worker, staleness, waited_s=0.5, parked_s=0.25))
    stats.record(update(0, staleness=9, applied=False, waited_s=0.5))
    stats.record(update(2, staleness=7, applied=False, rejected=True))
    stats.refuse()
    stats.refuse()

    assert stats.as_dict() == {
        "updates": 4,
        "ranks": 3,
        "staleness": {0: 2, 2: 2},
        "staleness_by_rank": {0: {0: 1}, 1: {2: 2, 0: 1}, 2: {}},
        "updates_by_rank": {0: 1, 1: 3, 2: 0},
        "batches_by_rank": {0: 4, 1: 6, 2: 2},
        "wait_seconds_by_rank": {0: 1.0, 1: 1.5, 2: 0.0},
        "parked_seconds_by_rank": {0: 0.25, 1: 0.75, 2: 0.0},
        "host_by_rank": {0: "", 1: "", 2: ""},
        "cores_by_rank": {0: 0, 1: 0, 2: 0},
        "cores_used_by_rank": {0: 0.0, 1: 0.0, 2: 0.0},
        "all_reduce_seconds": 0.0,
        "wire_bytes": 0,
        "dropped": 1,
        "rejected": 1,
        "rejected_by_rank": {0: 0, 1: 0, 2: 1},
        "refused": 2,
        "evicted": [],
        "joined": [],
        "train_seconds": 0.0,
        "median_step_seconds_by_rank": {0: pytest.approx(0.0, abs=1e-3), 1: pytest.approx(0.0, abs=1e-3), 2: 0.0},
    }
    json.dumps(stats.as_dict())


def test_the_statistics_travel_to_the_process_that_started_the_run() -> None:
    stats = RunStats(workers=2)
    stats.record(update(1, 3))

    other = pickle.loads(pickle.dumps(stats))

    assert other.as_dict() == stats.as_dict()
    other.refuse()  # its lock is its own
    assert stats.refused == 0


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_a_step_is_timed_without_its_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes for 2 s, then waits 0.3 s for the way there, a parked time, and 0.5 s for the way back."""
    clock, stats = Clock(monkeypatch), RunStats(workers=2)
    stats.start_segment()
    waited_s = 0.0
    for parked_s in (0.0, 7.0, 1.0, 0.0, 4.0):
        clock.now += 2.0 + 0.3 + parked_s
        stats.record(update(1, 0, waited_s=waited_s, parked_s=parked_s))
        clock.now += 0.5
        waited_s = 0.3 + parked_s + 0.5
    stats.end_segment()

    assert stats.step_seconds(1) == pytest.approx([2.0] * 4)
    assert stats.step_seconds(0) == []
    assert stats.as_dict()["median_step_seconds_by_rank"] == {0: 0.0, 1: pytest.approx(2.0)}
    assert stats.train_seconds == pytest.approx(5 * 2.8 + 12.0)


def test_a_validation_counts_neither_as_a_step_nor_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stats = Clock(monkeypatch), RunStats(workers=1)
    for _ in range(2):
        stats.start_segment()
        for _ in range(3):
            clock.now += 1.0
            stats.record(update(0, 0))
        stats.end_segment()
        clock.now += 100.0

    assert stats.step_seconds(0) == pytest.approx([1.0] * 4)
    assert stats.train_seconds == pytest.approx(6.0)


def test_the_summary_is_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stats = Clock(monkeypatch), RunStats(workers=2)
    stats.start_segment()
    for worker, staleness in [(0, 0), (0, 0), (1, 6), (0, 2)]:
        clock.now += 1.0
        stats.record(update(worker, staleness, waited_s=0.5))
    stats.end_segment()

    summary = stats.summary()

    assert summary["updates"] == 4.0
    assert (summary["staleness_mean"], summary["staleness_p95"], summary["staleness_max"]) == (2.0, 6.0, 6.0)
    assert summary["updates_per_second"] == pytest.approx(1.0)
    assert summary["wait_fraction"] == pytest.approx(2.0 / 8.0)
    assert (summary["updates_rank_0"], summary["share_rank_1"]) == (3.0, 0.25)
    assert summary["wait_fraction_rank_0"] == pytest.approx(1.5 / 4.0)
