"""A rank that is lost is taken out once, in an order that lets nothing of it be lost, or the run ends."""

from __future__ import annotations

import threading

import pytest

from lightning_async.runtime import evictions as room
from lightning_async.runtime.evictions import Evictions
from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.runtime.roster import Roster
from tests.harness import Call

pytestmark = pytest.mark.timeout(30)
KILLED = "its process was killed by SIGKILL"


def evicting(ranks: int = 3, min_ranks: int = 1) -> Evictions:
    evictions = Evictions(Roster(range(ranks), min_ranks), FailureLatch())
    evictions.under_way = True
    return evictions


def test_the_line_tells_who_why_how_many_go_on_and_what_becomes_of_its_batches(
    capfd: pytest.CaptureFixture[str],
) -> None:
    evictions = evicting()
    evictions.before.append(lambda rank, reason: "its unfinished batch is handed out again")
    evictions.steps += [lambda rank, reason: None, lambda rank, reason: "it is started again"]

    evictions.lose(RunFailure(2, KILLED))
    evictions.lose(RunFailure(1, "gave no sign of life for 60 s (worker_timeout)"))

    first, second = capfd.readouterr().err.splitlines()
    assert first == (
        f"[rank 0] lightning_async: rank 2 is lost: {KILLED}; 2 ranks go on without it; "
        "its unfinished batch is handed out again; it is started again"
    )
    assert "1 rank goes on without it" in second
    assert evictions.roster.living == (0,)


def test_what_a_rank_was_handed_is_handed_back_before_a_meeting_does_without_it() -> None:
    """Else the others could meet between the two, find nothing left to compute, and end the epoch without it."""
    evictions = evicting()
    found: list[tuple[str, bool]] = []
    evictions.before.append(lambda rank, reason: found.append(("handed back", rank in evictions.roster)))
    evictions.steps.append(lambda rank, reason: found.append(("told", rank in evictions.roster)))

    evictions.lose(RunFailure(2, KILLED))

    assert found == [("handed back", True), ("told", False)]


def test_a_rank_is_lost_once_whoever_notices_it() -> None:
    evictions = evicting()
    steps: list[int] = []
    evictions.steps.append(lambda rank, reason: steps.append(rank))

    calls = [Call(lambda: evictions.lose(RunFailure(2, KILLED))) for _ in range(8)]

    assert [call.outcome() for call in calls] == [None] * 8
    assert steps == [2]


@pytest.mark.parametrize(
    ("rank", "ranks", "min_ranks", "under_way"),
    [(0, 3, 1, True), (1, 2, 2, True), (1, 3, 1, False)],
    ids=["rank-0", "too-few", "before-training"],
)
def test_a_loss_that_the_run_cannot_bear_ends_it(rank: int, ranks: int, min_ranks: int, under_way: bool) -> None:
    evictions = evicting(ranks, min_ranks)
    evictions.under_way = under_way
    steps: list[int] = []
    evictions.before.append(lambda rank, reason: steps.append(rank))

    evictions.lose(RunFailure(rank, KILLED))

    assert evictions._latch.failure == RunFailure(rank, KILLED)
    assert (evictions.roster.living, steps) == (tuple(range(ranks)), [])


def test_nothing_is_decided_once_the_run_has_failed() -> None:
    evictions = evicting()
    evictions._latch.trip(RunFailure(1, "ValueError: no"))

    evictions.lose(RunFailure(2, KILLED))

    assert evictions.roster.living == (0, 1, 2)


def test_a_lost_connection_waits_for_the_news_of_what_became_of_the_rank() -> None:
    evictions = evicting()
    release = threading.Event()
    evictions.steps.append(lambda rank, reason: None if release.wait(10.0) else "late")

    noticed = Call(lambda: evictions.lose_connection(2, "connection closed"))
    assert noticed.waits()
    known = Call(lambda: evictions.lose(RunFailure(2, KILLED)))
    # It is out of the roster by then, and what is done about it is not done yet.
    assert noticed.waits()
    release.set()

    assert (known.outcome(), noticed.outcome()) == (None, None)
    assert evictions.roster.lost == [(2, KILLED)]


def test_without_news_the_connection_is_all_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_NEWS_TIMEOUT_S", 0.05)
    evictions = evicting()

    evictions.lose_connection(2, "connection closed")

    assert evictions.roster.lost == [(2, "connection closed")]


def test_a_lost_connection_does_not_outwait_the_end_of_the_run() -> None:
    evictions = evicting()
    evictions._latch.trip(RunFailure(1, "ValueError: no"))

    evictions.lose_connection(2, "connection closed")

    assert evictions.roster.living == (0, 1, 2)
