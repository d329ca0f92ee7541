"""How long the ranks of a host are waited for, and which are started again."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.strategies import host_processes as room
from lightning_async.strategies import launching
from lightning_async.strategies.host_processes import HostProcesses
from lightning_async.strategies.mailbox import Mailbox
from tests.harness import Call, eventually
from tests.launched_host import Host1, Process

pytestmark = pytest.mark.timeout(30)


def test_each_rank_of_another_host_is_started_again_the_first_like_any_other(host_1: Host1) -> None:
    host_1.begin_training()

    host_1.die(1)
    second = host_1.restarted(1)
    host_1.die(0)
    first = host_1.restarted(0)
    host_1.mailbox.put("result")
    second.end(0)
    first.end(0)

    assert host_1.waiting.outcome() == "result"
    assert host_1.started == [(1, host_1.rank_0.address), (0, host_1.rank_0.address)]


def test_the_host_says_what_rank_0_cannot_see(host_1: Host1, capfd: pytest.CaptureFixture[str]) -> None:
    host_1.begin_training()

    host_1.processes[1].end(-9)
    host_1.rank_0.lose(3, "its process is gone: the connection was closed")
    host_1.restarted(1)

    told = "[host 1] lightning_async: rank 3 is lost: its process was killed by SIGKILL; it is started again (1 of 1)\n"
    assert told in capfd.readouterr().err


def test_one_that_is_only_stopped_is_ended_and_started_again(host_1: Host1) -> None:
    host_1.begin_training()
    stopped = host_1.processes[1]

    host_1.rank_0.lose(3, "gave no sign of life for 2 s")
    host_1.restarted(1)

    assert stopped.exitcode == -9


def test_a_rank_that_is_lost_for_good_does_not_keep_the_host_from_its_result(host_1: Host1) -> None:
    host_1.begin_training()
    host_1.die(1)
    again = host_1.restarted(1)
    host_1.rank_0.evictions.roster.add(3)
    again.end(-9)
    host_1.rank_0.lose(3)

    host_1.mailbox.put("result")
    host_1.processes[0].end(0)

    assert host_1.waiting.outcome() == "result"
    assert len(host_1.started) == 1


def test_the_others_of_a_host_whose_first_is_lost_for_good_come_to_their_end_without_a_result(
    host_1: Host1, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its end is not that of the run, after which the others would have so long.
    monkeypatch.setattr(launching, "END_TIMEOUT_S", 0.1)
    host_1.rank_0.launchers._most = 0
    host_1.begin_training()
    host_1.mailbox.put(RunFailure(2, "MemoryError: out of memory"))
    # Seen here before rank 0 says what becomes of it.
    host_1.processes[0].end(1)
    assert all(host_1.waiting.waits() for _ in range(5))
    host_1.rank_0.lose(2)

    host_1.processes[1].end(0)

    assert host_1.waiting.outcome() is None


def test_a_host_that_has_lost_all_its_ranks_ends_and_says_that_the_run_goes_on(host_1: Host1) -> None:
    host_1.rank_0.launchers._most = 0
    host_1.begin_training()

    host_1.die(1)
    host_1.die(0)

    error = host_1.waiting.ended()
    assert isinstance(error, WorkerFailedError)
    assert error.failure == RunFailure(
        2, "its process was killed by SIGKILL; the run goes on without this host, whose ranks are all lost"
    )


def test_what_a_rank_that_was_taken_out_says_of_its_end_is_not_the_runs(host_1: Host1) -> None:
    host_1.begin_training()
    host_1.mailbox.put(RunFailure(2, "was taken out of the run, which goes on without it"))
    host_1.die(0, code=1)
    host_1.restarted(0)

    host_1.mailbox.put("result")
    for process in host_1.processes:
        process.end(0)

    assert host_1.waiting.outcome() == "result"


@pytest.mark.parametrize("late", [[1], [0, 1]])
def test_one_that_comes_back_when_the_run_has_just_ended_well_is_no_failure(host_1: Host1, late: list[int]) -> None:
    host_1.begin_training()
    for index in late:
        host_1.die(index)
        host_1.restarted(index)

    host_1.rank_0.launchers.close()
    if 0 not in late:
        host_1.mailbox.put("result")
        host_1.processes[0].end(0)
    for index in late:
        # It cannot join the run.
        host_1.processes[index].end(1)

    assert host_1.waiting.outcome() == (None if 0 in late else "result")


def test_a_first_rank_that_leaves_by_itself_leaves_the_others_training(host_1: Host1) -> None:
    host_1.begin_training()

    host_1.processes[0].end(0)
    host_1.rank_0.evictions.let_go(RunFailure(2, "it was told to end (SIGTERM)"))

    assert host_1.waiting.waits()
    host_1.processes[1].end(0)
    assert host_1.waiting.outcome() is None


def test_a_host_that_is_told_to_end_ends_as_one_that_is_told_to(host_1: Host1) -> None:
    host_1.begin_training()

    for index in (0, 1):
        host_1.rank_0.evictions.let_go(RunFailure(2 + index, "it was told to end (SIGTERM)"))
        host_1.processes[index].end(0)

    assert isinstance(host_1.waiting.ended(), SIGTERMException)


def test_a_job_that_is_told_to_end_ends_so_on_another_host(host_1: Host1) -> None:
    host_1.begin_training()

    for process in host_1.processes:
        process.end(0)

    assert isinstance(host_1.waiting.ended(), SIGTERMException)


def test_a_run_that_has_failed_is_told_as_the_first_rank_knows_it(
    host_1: Host1, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "END_TIMEOUT_S", 0.3)
    host_1.begin_training()
    failure = RunFailure(1, "ValueError: no")

    host_1.rank_0.latch.trip(failure)
    host_1.rank_0.launchers.close()
    host_1.mailbox.put(failure)
    host_1.processes[0].end(1)

    # The other one is stuck, and is ended.
    error = host_1.waiting.ended()
    assert isinstance(error, WorkerFailedError) and error.failure == failure
    assert host_1.processes[1].exitcode == -9
    assert host_1.started == []


def test_a_rank_whose_end_rank_0_never_judges_is_not_waited_for_without_an_end(
    host_1: Host1, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "END_TIMEOUT_S", 0.3)
    host_1.begin_training()
    host_1.rank_0.latch.trip(RunFailure(0, "ValueError: no"))

    host_1.processes[0].end(1)
    host_1.processes[1].end(1)

    error = host_1.waiting.ended()
    assert isinstance(error, WorkerFailedError) and error.failure.reason == "its process exited with code 1"


def test_before_training_the_end_of_the_first_rank_is_the_hosts(host_1: Host1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "END_TIMEOUT_S", 0.3)

    host_1.processes[0].end(-9)

    error = host_1.waiting.ended()
    assert isinstance(error, WorkerFailedError)
    assert error.failure == RunFailure(2, "its process was killed by SIGKILL")


def test_without_rank_0_lost_ranks_are_not_started_again_and_that_is_said(
    host_1: Host1, capfd: pytest.CaptureFixture[str]
) -> None:
    host_1.rank_0.entrance.listener.close()

    host_1.mailbox.put(host_1.rank_0.address)

    lines: list[str] = []
    told = "[host 1] lightning_async: lost ranks of this host are not started again: no holder answers"
    assert eventually(lambda: lines.append(capfd.readouterr().err) or told in "".join(lines))


@pytest.mark.parametrize("is_over", [False, True])
def test_a_rank_0_that_says_nothing_of_the_others_ends_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_over: bool
) -> None:
    """It is stopped, and they have ended for that; one that saves something when all is over has the time."""
    monkeypatch.setattr(room, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(launching, "POLL_S", 0.05)
    monkeypatch.setattr(launching, "END_TIMEOUT_S", 0.2)
    processes: list[Any] = [Process(), Process()]
    mailbox = Mailbox(multiprocessing.get_context("fork"))
    host = HostProcesses(processes, [str(tmp_path / f"error-{index}") for index in range(2)], 0, goes_on=True)
    host._is_over = is_over
    waiting = Call(lambda: host.wait(mailbox), "host-0")
    processes[1].end(1)

    if is_over:
        waiting.join(0.8)
        assert waiting.is_alive()
        mailbox.put("result")
        processes[0].end(0)
        assert waiting.outcome(5.0) == "result"
    else:
        with pytest.raises(WorkerFailedError, match="rank 0 failed: its process did not end"):
            waiting.outcome(5.0)
        assert host.has_lost_first
    mailbox.close()
    for process in processes:
        process.close()


def test_what_is_told_when_nobody_reads_any_more_is_dropped() -> None:
    """Else a rank whose parent was killed would wait in its last write for ever."""
    mailbox = Mailbox(multiprocessing.get_context("fork"))
    mailbox.only_write()

    mailbox.put(bytes(1 << 20))

    mailbox.close()
