"""A worker is too slow by a limit, in the middle of its step too, or by its own past; by nobody else's pace."""

from __future__ import annotations

import pytest

from lightning_async.runtime.health import Sick
from lightning_async.runtime.step_watch import StepWatch


def steps(watch: StepWatch, worker: int, seconds: list[float]) -> list[Sick]:
    """What comes of a worker's steps, one after the other."""
    found, now = [], 0.0
    for step_s in seconds:
        watch.begin(worker, 0, now)
        now += step_s
        found.append(watch.end(worker, 0, now))
    return [sick for sick in found if sick is not None]


def test_a_step_that_takes_too_long_is_seen_while_it_takes_and_told_once() -> None:
    watch = StepWatch(timeout_s=10.0)
    watch.begin(1, 0, 0.0)
    watch.begin(2, 0, 5.0)

    assert watch.overdue(10.0) == []
    (sick,) = watch.overdue(10.1)
    assert (sick.worker, sick.everyone) == (1, False)
    assert sick.reason.startswith("it has computed one step for more than 10 s (step_timeout)")
    assert watch.overdue(10.2) == []


def test_a_worker_that_waits_or_has_left_computes_nothing() -> None:
    watch = StepWatch(timeout_s=10.0)
    for worker in range(3):
        watch.begin(worker, 0, 0.0)
    watch.end(0, 0, 1.0)
    watch.leave(1, 0)
    watch.forget(2)

    assert watch.overdue(100.0) == []


def test_a_worker_that_becomes_slower_than_its_own_past_is_seen() -> None:
    (sick,) = steps(StepWatch(max_slowdown=3.0), 2, [0.1] * 40 + [0.5] * 10)

    assert sick.worker == 2
    assert "its last 10 steps took 0.5 s each, 5.0 times as long as its steps before" in sick.reason


@pytest.mark.parametrize(
    "seconds",
    [
        [0.5] * 200,
        [5.0] * 5 + [0.1] * 60,
        [0.1] * 40 + [0.29] * 40,
        [0.1] * 40 + [9.0, 0.1, 9.0, 0.1, 0.1] * 4,
        [0.1] * 20 + [0.5] * 10,
    ],
    ids=["always slow", "slow at first", "within the limit", "some long steps", "too little past"],
)
def test_what_is_no_change_of_pace_is_let_be(seconds: list[float]) -> None:
    assert steps(StepWatch(max_slowdown=3.0), 0, seconds) == []


def test_a_slow_worker_is_measured_by_its_own_past_alone() -> None:
    watch = StepWatch(max_slowdown=3.0)

    assert steps(watch, 0, [0.1] * 60) == []
    assert steps(watch, 1, [1.0] * 60) == []


def test_without_limits_nothing_is_too_slow() -> None:
    watch = StepWatch()

    assert steps(watch, 0, [0.1] * 60 + [90.0] * 60) == []
    watch.begin(0, 0, 0.0)
    assert watch.overdue(1e9) == []
