"""What a rank's error becomes: its own, another rank's, or a quiet end."""

from __future__ import annotations

import threading
import time
import traceback
from types import SimpleNamespace

import pytest

from lightning_async.runtime import membership
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.runtime.membership import Membership
from lightning_async.transport.base import ChannelClosedError
from tests.harness import eventually

pytestmark = pytest.mark.timeout(20)
KILLED = RunFailure(2, "its process was killed by SIGKILL")


class AskedToLeave(SystemExit):
    """Stands for Lightning's SIGTERMException."""


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the rank waited to let the culprit exit first; nobody really waits."""
    delays: list[float] = []
    clock = SimpleNamespace(sleep=delays.append, monotonic=lambda: sum(delays))
    monkeypatch.setattr(membership, "time", clock)
    return delays


def member(rank: int) -> Membership:
    mine = Membership(rank, 60.0, graceful=(AskedToLeave,), exit_process=lambda code: None)
    mine._guard.disarm()
    return mine


def owned(rank: int, told: list[int]) -> Membership:
    """The same in a process that an engine owns, and takes errors of; ``told`` is where it had to be told."""
    return Membership(rank, 60.0, exit_process=told.append, is_owned=True)


def leave(member: Membership, error: BaseException) -> BaseException:
    """What a rank's part ends with if ``error`` is raised in it."""
    with pytest.raises(BaseException) as raised, member.guard():  # noqa: PT011
        raise error
    return raised.value


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), RuntimeError("bad shape")])
def test_a_ranks_own_error_stays_what_it_is_and_is_everyones_reason(rank: int, error: BaseException) -> None:
    mine = member(rank)

    assert leave(mine, error) is error
    assert error.__cause__ is None
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    assert mine.latch.failure == RunFailure(rank, text, announced=True)


def test_nothing_happens_to_a_part_that_ends_well() -> None:
    mine = member(0)

    with mine.guard():
        pass

    assert mine.latch.failure is None


def test_leaving_when_asked_to_is_no_failure() -> None:
    mine, error = member(1), AskedToLeave()

    assert leave(mine, error) is error
    assert mine.latch.failure is None


def test_rank_0_names_the_rank_that_failed(delays: list[float]) -> None:
    mine, error = member(0), RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    mine.latch.trip(KILLED)

    explained = leave(mine, error)

    assert isinstance(explained, WorkerFailedError)
    assert explained.failure == KILLED
    assert explained.__cause__ is error
    # torchrun takes the first that exits for the culprit.
    assert sum(delays) == pytest.approx(2.0, abs=0.1)


def test_who_is_told_to_end_leaves_no_more_time_to_the_culprit(delays: list[float]) -> None:
    """torchrun has seen the failure when it sends a SIGTERM, and starts the ranks again when all have ended."""
    mine = Membership(0, 60.0, exit_process=lambda code: None, is_told_to_end=lambda: sum(delays) > 0.3)
    mine._guard.disarm()
    mine.latch.trip(KILLED)
    leave(mine, RuntimeError("Connection closed by peer"))

    assert sum(delays) == pytest.approx(0.3, abs=0.1)


def test_an_explanation_is_not_explained_again() -> None:
    mine, error = member(0), WorkerFailedError(KILLED)
    mine.latch.trip(KILLED)

    explained = leave(mine, error)

    assert explained is error
    assert "".join(traceback.format_exception(explained)).count("Traceback") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234"),
        ChannelClosedError("connection closed"),
    ],
)
def test_a_lost_peer_is_explained_by_news_that_come_later(error: Exception) -> None:
    mine = member(0)
    threading.Timer(0.2, mine.latch.trip, (KILLED,)).start()

    explained = leave(mine, error)

    assert isinstance(explained, WorkerFailedError)
    assert explained.failure == KILLED


def test_without_news_a_lost_peer_is_this_ranks_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.runtime.failure._NEWS_TIMEOUT_S", 0.1)
    mine, error = member(0), RuntimeError("Connection closed by peer")

    assert leave(mine, error) is error
    assert mine.latch.failure == RunFailure(0, "RuntimeError: Connection closed by peer", announced=True)


def test_a_bystander_ends_quietly_where_rank_0_tells_the_user(
    capfd: pytest.CaptureFixture[str], delays: list[float]
) -> None:
    mine = member(1)
    mine.latch.trip(RunFailure(2, KILLED.reason, announced=True))

    explained = leave(mine, RuntimeError("Connection closed by peer"))

    assert isinstance(explained, SystemExit)
    assert explained.code == 1
    assert capfd.readouterr().err == ""
    assert sum(delays) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("announced", "waits"), [(True, 4.0), (False, 0.0)])
def test_where_an_engine_takes_errors_a_bystander_raises_the_failure_after_the_rank_at_fault(
    rank: int, announced: bool, waits: float, delays: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    mine = owned(rank, [])
    mine.latch.trip(RunFailure(2, "ValueError: no", announced=announced))

    explained = leave(mine, RuntimeError("Connection closed by peer"))

    assert isinstance(explained, WorkerFailedError)
    assert str(explained) == "rank 2 failed: ValueError: no"
    assert sum(delays) == pytest.approx(waits, abs=0.1)
    assert capfd.readouterr().err == ""


def test_where_an_engine_takes_errors_it_is_not_told_of_a_rank_that_came_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_GRACE_S", -0.7)
    told: list[int] = []
    mine = owned(1, told)

    # Its guard would act 0.3 s after the failure.
    leave(mine, ValueError("no"))
    time.sleep(0.6)

    assert told == []


def test_where_an_engine_takes_errors_it_is_told_of_a_rank_that_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(membership, "_GRACE_S", -1.0)
    told: list[int] = []
    mine = owned(1, told)

    mine.latch.trip(KILLED)

    assert eventually(lambda: told == [1])
    assert "this rank's thread does not come back" in capfd.readouterr().err


@pytest.mark.parametrize(("failed", "wakes"), [(2, 1), (1, 0)])
def test_where_an_engine_takes_errors_another_ranks_failure_ends_the_collectives(
    failed: int, wakes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[None] = []
    monkeypatch.setattr(membership, "break_groups", lambda: woken.append(None))
    mine = owned(1, [])

    mine.latch.trip(RunFailure(failed, "it is gone", announced=True))
    mine._guard.disarm()

    assert len(woken) == wakes


def test_a_bystander_says_it_where_nobody_else_does(capfd: pytest.CaptureFixture[str], delays: list[float]) -> None:
    mine = member(1)
    mine.latch.trip(RunFailure(0, "its process is gone"))

    assert isinstance(leave(mine, RuntimeError("Connection closed by peer")), SystemExit)
    assert capfd.readouterr().err == "[rank 1] lightning_async: rank 0 failed: its process is gone\n"
    assert delays == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_is_each_ranks_own_whoever_noticed_it_first(rank: int) -> None:
    mine, error = member(rank), KeyboardInterrupt()
    mine.latch.trip(RunFailure(2, "KeyboardInterrupt", announced=True))

    assert leave(mine, error) is error


# --- where the run goes on without ranks that it loses ----------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each time that this rank's process groups were broken."""
    broken: list[str] = []
    monkeypatch.setattr("lightning_async.runtime.losses.break_groups", lambda: broken.append("broken"))
    return broken


def test_a_rank_that_is_taken_out_itself_ends(broken: list[str]) -> None:
    mine = member(2)

    mine._hear_of(KILLED)

    assert str(mine.latch.failure) == (
        "rank 2 failed: was taken out of the run, which goes on without it: its process was killed by SIGKILL"
    )
    assert not broken


def test_a_collective_of_user_code_that_a_loss_breaks_outside_of_a_section_ends_the_run_and_says_why(
    broken: list[str],
) -> None:
    mine, error = member(0), RuntimeError("Connection closed by peer")
    mine._hear_of(KILLED)

    explained = leave(mine, error)

    assert isinstance(explained, WorkerFailedError)
    assert "rank 2 failed: its process was killed by SIGKILL. The run would have gone on without it" in str(explained)
    assert "outside of validation, which cannot be repeated" in str(explained)
