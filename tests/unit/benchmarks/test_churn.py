"""What the events of a run with deaths come to."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.churn_count import Found, count_async, count_ddp, lives_of
from lightning_async.chaos.striker import Strike


def begins(pid: int, rank: int, at: float, step: int = 0) -> dict[str, Any]:
    return {"what": "begins", "pid": pid, "rank": rank, "at_s": at, "ready_s": at - 0.5, "step": step}


def update(rank: int, at: float, ticket: int) -> dict[str, Any]:
    return {"what": "update", "pid": 1, "rank": rank, "at_s": at, "tickets": [ticket], "applied": True}


def step(pid: int, at: float, number: int, sample: int, epoch: int = 0) -> dict[str, Any]:
    return {"what": "step", "pid": pid, "at_s": at, "step": number, "epoch": epoch, "samples": [sample]}


def test_a_killed_worker_lives_until_its_death_and_one_that_ends_with_it_until_its_last_event() -> None:
    events = [begins(1, 0, 0.0), begins(2, 1, 0.0), step(1, 4.0, 4, 0), begins(3, 0, 9.0), begins(4, 1, 9.0)]

    lives = lives_of(events, {2: 5.0}, ended=20.0)

    assert [(life.rank, life.begins_s, life.ends_s) for life in lives] == [
        *((0, 0.0, 4.0), (1, 0.0, 5.0), (0, 9.0, 20.0), (1, 9.0, 20.0))
    ]


def test_the_living_are_asked_for_what_they_could_do_alone() -> None:
    # Two ranks of one batch a second; rank 1 is dead from 4 to 6.
    events = [begins(1, 0, 0.0), begins(2, 1, 0.0), begins(3, 1, 6.0)]
    events += [update(0, 0.9 + at, at) for at in range(10)]
    events += [update(1, at, int(at) + 10) for at in (0.8, 1.8, 2.8, 3.8, 6.9, 7.9, 8.9, 9.9)]
    events.sort(key=lambda event: float(event["at_s"]))
    strikes = [Strike(4.0, "kill", 1, 2)]

    lives = lives_of(events, {2: 4.0}, ended=10.0)
    found = Found.of(count_async(events, 18, 0.0, 10.0), lives, strikes, 0.0, 10.0, alone=1.0, step_s=1.0, ranks=2)

    assert (found.of_living, found.of_all) == pytest.approx((1.0, 0.9))
    # Nor does it count as a gap of the survivors that nothing came of the dead.
    assert found.longest_gap_steps == pytest.approx(1.0)
    assert (found.first_gradient_s, found.after_imports_s) == (pytest.approx([2.9]), pytest.approx([1.4]))


def test_steps_that_are_begun_anew_from_a_checkpoint_do_not_count() -> None:
    # Killed after step 4; the checkpoint was of step 2, and the loader begins anew.
    events = [begins(1, 0, 0.0), *(step(1, number, number, number - 1) for number in (1, 2, 3, 4))]
    events += [begins(2, 0, 10.0, step=2), *(step(2, 10.0 + n, 2 + n, n - 1) for n in (1, 2)), step(2, 14.0, 5, 0, 1)]

    counted = count_ddp(events, samples=4, began=0.0, ended=20.0)

    assert counted.batches == 5
    assert (counted.lost, counted.repeated, counted.epochs) == (2, 2, 1)


def test_what_is_applied_twice_or_never_is_counted() -> None:
    events = [update(0, at, ticket) for at, ticket in enumerate([0, 1, 1, 3, 0])]

    counted = count_async(events, 4, 0.0, 9.0)

    assert (counted.lost, counted.repeated, counted.epochs, counted.batches) == (1, 1, 1, 5)
