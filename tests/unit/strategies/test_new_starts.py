"""Rank 0 is started again with all others where the run is to go on, and something is left to go on from."""

from __future__ import annotations

import os
from typing import Any

import pytest

from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.runtime.roster import Resilience
from lightning_async.strategies import new_starts
from lightning_async.strategies.new_starts import NewStarts

KILLED = RunFailure(0, "its process was killed by SIGKILL")
VARIABLES = ("LIGHTNING_ASYNC_RUN", "LIGHTNING_ASYNC_NEW_STARTS")


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(new_starts.time, "sleep", slept.append)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return slept


def run(starts: NewStarts, failures: list[RunFailure | None], is_lost: bool = True) -> list[tuple[str | None, ...]]:
    """Starts as often as it takes; returns what each start sees in its environment."""
    seen = []
    with starts.named():
        while starts.is_wanted:
            starts.wait()
            with starts.attempt(lambda: is_lost):
                seen.append(tuple(map(os.environ.get, VARIABLES)))
                if (failure := failures.pop(0)) is not None:
                    raise WorkerFailedError(failure)
    return seen


def test_all_starts_have_one_name_and_a_number(slept: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    seen = run(NewStarts(Resilience("continue", max_restarts=2), is_possible=True), [KILLED, KILLED, None])

    assert len({name for name, _ in seen}) == 1
    assert all(name for name, _ in seen)
    assert [number for _, number in seen] == [None, "1", "2"]
    assert slept == [0.0, 0.0, 1.0]
    assert not any(name in os.environ for name in VARIABLES)
    first = "rank 0 is lost: its process was killed by SIGKILL; all ranks are started again, from the newest snapshot"
    said = capsys.readouterr().err.splitlines()
    assert said == [f"[host 0] lightning_async: {first} ({count} of 2)" for count in (1, 2)]


def test_a_name_that_the_run_has_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ASYNC_RUN", "mine")

    assert run(NewStarts(Resilience("continue", max_restarts=1), is_possible=True), [KILLED, None]) == [
        ("mine", None),
        ("mine", "1"),
    ]
    assert os.environ["LIGHTNING_ASYNC_RUN"] == "mine"


@pytest.mark.parametrize(
    ("resilience", "is_possible", "failure", "is_lost"),
    [
        (Resilience("stop", max_restarts=3), True, KILLED, True),
        # No snapshots, or ranks of other hosts.
        (Resilience("continue", max_restarts=3), False, KILLED, True),
        # The others have lost one rank too many.
        (Resilience("continue", max_restarts=3), True, RunFailure(2, "its process was killed by SIGKILL"), True),
        # An error of user code on rank 0, or a SIGTERM.
        (Resilience("continue", max_restarts=3), True, RunFailure(0, "ValueError: no"), False),
        (Resilience("continue", max_restarts=0), True, KILLED, True),
    ],
    ids=["stop", "impossible", "another rank", "not lost", "no restarts"],
)
def test_any_other_end_is_the_end(
    resilience: Resilience, is_possible: bool, failure: RunFailure, is_lost: bool
) -> None:
    with pytest.raises(WorkerFailedError, match=failure.reason):
        run(NewStarts(resilience, is_possible), [failure], is_lost)


@pytest.mark.parametrize(("policy", "said"), [("continue", True), ("stop", False)])
def test_a_run_that_could_have_gone_on_says_with_what(
    policy: Any, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailedError):
        run(NewStarts(Resilience(policy), is_possible=False, hint="see snapshot_every_s"), [KILLED])

    told = "rank 0 is lost: its process was killed by SIGKILL; see snapshot_every_s\n"
    assert capsys.readouterr().err == (f"[host 0] lightning_async: {told}" if said else "")


def test_it_is_given_up_after_as_many_as_are_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerFailedError):
        run(NewStarts(Resilience("continue", max_restarts=2), is_possible=True), [KILLED] * 3)

    assert "it was started again 2 times in a row (max_restarts)" in capsys.readouterr().err
