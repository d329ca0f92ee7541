"""The latch keeps the first failure and tells everyone; the guard ends a process that cannot end itself."""

from __future__ import annotations

import copy
import pickle
import resource
import sys
import threading
from pathlib import Path

import pytest

from lightning_async.runtime.alarms import Alarm
from lightning_async.runtime.failure import ExitGuard, FailureLatch, RunFailure, WorkerFailedError, describe_error

pytestmark = pytest.mark.timeout(20)
KILLED = RunFailure(2, "its process was killed by SIGKILL")


def test_the_message_names_the_rank_and_the_reason() -> None:
    assert str(WorkerFailedError(KILLED)) == "rank 2 failed: its process was killed by SIGKILL"


def test_the_error_survives_the_way_between_processes() -> None:
    error = WorkerFailedError(KILLED)

    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert other.failure == KILLED
        assert str(other) == str(error)


def test_the_first_failure_is_kept() -> None:
    latch = FailureLatch()
    latch.check()

    assert latch.trip(KILLED)
    assert not latch.trip(RunFailure(0, "a consequence"))
    assert latch.failure == KILLED
    with pytest.raises(WorkerFailedError, match="rank 2 failed"):
        latch.check()


def test_of_many_threads_one_trips_it_and_every_listener_hears_that_one_once() -> None:
    latch = FailureLatch()
    heard: list[RunFailure] = []
    latch.subscribe(heard.append)
    start = threading.Barrier(8)
    first: list[int] = []

    def trip(rank: int) -> None:
        start.wait()
        if latch.trip(RunFailure(rank, "at the same time")):
            first.append(rank)

    threads = [threading.Thread(target=trip, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(first) == 1
    assert heard == [RunFailure(first[0], "at the same time")]


def test_a_listener_that_comes_late_hears_of_it_at_once() -> None:
    latch = FailureLatch()
    latch.trip(KILLED)
    heard: list[RunFailure] = []

    latch.subscribe(heard.append)

    assert heard == [KILLED]


def test_waiting_ends_with_the_failure_or_the_time() -> None:
    latch = FailureLatch()
    assert latch.wait(0.01) is None

    threading.Timer(0.05, latch.trip, (KILLED,)).start()

    assert latch.wait(10.0) == KILLED


class Exits:
    """Takes the place of the end of the process."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


def test_the_guard_ends_a_stuck_process_after_its_grace_and_says_why(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latch, exits = FailureLatch(), Exits()
    graces: list[float] = []
    set_alarm = Alarm.set

    def set_to_now(alarm: Alarm, delay_s: float) -> None:
        graces.append(delay_s)
        set_alarm(alarm, 0.0)

    monkeypatch.setattr(Alarm, "set", set_to_now)
    ExitGuard(1, latch, grace_s=3600.0, exit_process=exits)
    assert graces == []

    latch.trip(KILLED)

    assert exits.happened.wait(5.0)
    assert graces == [3600.0]
    assert exits.codes == [1]
    assert capfd.readouterr().err == (
        "[rank 1] lightning_async: rank 2 failed: its process was killed by SIGKILL; ending this process.\n"
    )


def test_the_guard_is_quiet_where_another_process_tells_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    latch, exits = FailureLatch(), Exits()
    ExitGuard(1, latch, grace_s=0.0, exit_process=exits)

    latch.trip(RunFailure(2, "told elsewhere", announced=True))

    assert exits.happened.wait(5.0)
    assert capfd.readouterr().err == ""


def test_a_disarmed_guard_leaves_the_process_alone() -> None:
    latch, exits = FailureLatch(), Exits()
    guard = ExitGuard(1, latch, grace_s=0.05, exit_process=exits)
    guard.disarm()
    latch.trip(KILLED)

    assert not exits.happened.wait(0.3)


def test_the_guard_ends_a_process_that_cannot_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    latch, exits = FailureLatch(), Exits()
    ExitGuard(1, latch, grace_s=0.0, exit_process=exits)
    monkeypatch.setattr(sys, "stderr", None)

    latch.trip(KILLED)

    assert exits.happened.wait(5.0)


def test_the_guard_needs_no_new_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    latch, exits = FailureLatch(), Exits()
    ExitGuard(1, latch, grace_s=0.0, exit_process=exits)
    monkeypatch.setattr(threading.Thread, "start", refuse)

    latch.trip(KILLED)

    assert exits.happened.wait(5.0)


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_listener_that_fails_keeps_the_others_from_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def out_of_memory(failure: RunFailure) -> None:
        raise MemoryError

    latch = FailureLatch()
    heard: list[RunFailure] = []
    latch.subscribe(out_of_memory)
    latch.subscribe(heard.append)

    assert latch.trip(KILLED)
    assert heard == [KILLED]
    assert "MemoryError" in caplog.text


def test_a_failure_gives_memory_back() -> None:
    latch = FailureLatch()
    before = address_space_bytes()

    latch.trip(KILLED)

    assert before - address_space_bytes() > 16 * 2**20


def address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_an_error_without_a_text_has_a_name() -> None:
    assert describe_error(KeyError()) == "KeyError"
    assert describe_error(MemoryError()) == "MemoryError: out of memory"
    assert describe_error(Unprintable()) == "Unprintable, whose text could not be made: ValueError"


def test_a_lost_connection_is_explained_by_what_the_heartbeat_reports_a_moment_later() -> None:
    latch = FailureLatch()
    threading.Timer(0.05, latch.trip, (KILLED,)).start()

    assert latch.explain_loss(lambda: RunFailure(0, "connection closed")) == KILLED


def test_without_a_report_a_lost_connection_is_blamed_on_the_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.runtime.failure._NEWS_TIMEOUT_S", 0.01)
    latch, lost = FailureLatch(), RunFailure(0, "connection closed")

    assert latch.explain_loss(lambda: lost) == lost
    assert latch.failure == lost
