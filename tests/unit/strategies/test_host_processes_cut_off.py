"""A host that is cut off from rank 0 takes part again, or ends, and waits for neither without an end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.strategies import host_processes as room
from lightning_async.transport.base import ChannelClosedError
from tests.harness import eventually
from tests.launched_host import Host1, Process

pytestmark = pytest.mark.timeout(30)

SILENT = RunFailure(0, "gave no sign of life for 20 s (worker_timeout)")


def lose_sight(host_1: Host1) -> None:
    """The host is cut off: its ranks end by themselves, and nothing has come from rank 0."""
    host_1.mailbox.put(SILENT)
    for process in list(host_1.processes):
        process.end(1)


def test_a_host_that_was_cut_off_takes_part_again_once_it_hears_of_rank_0(host_1: Host1) -> None:
    host_1.begin_training()
    lose_sight(host_1)
    assert host_1.waiting.waits()

    for rank in (2, 3):
        host_1.rank_0.lose(rank, "gave no sign of life for 20 s (worker_timeout)")

    restarted = [host_1.restarted(index) for index in (0, 1)]
    # As a rank does: its end without a word would be that of one that was told to end.
    host_1.mailbox.put("result")
    for process in restarted:
        process.end(0)
    assert host_1.waiting.outcome() == "result"


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "while they are looked at"])
def test_it_calls_rank_0_again_where_its_connection_has_not_survived(
    host_1: Host1, monkeypatch: pytest.MonkeyPatch, meanwhile: bool
) -> None:
    """Whenever its ranks end: what they have said of it is heard before their end counts."""
    host_1.begin_training()
    receive, is_alive = room.LauncherConnection.receive, Process.is_alive

    def end(process: Process) -> bool:
        monkeypatch.setattr(Process, "is_alive", is_alive)
        lose_sight(host_1)
        return process.is_alive()

    def time_out(connection: Any) -> Any:
        monkeypatch.setattr(room.LauncherConnection, "receive", receive)
        if meanwhile:
            monkeypatch.setattr(Process, "is_alive", end)
        raise ChannelClosedError("connection lost while receiving") from TimeoutError()

    monkeypatch.setattr(room.LauncherConnection, "receive", time_out)
    host_1.rank_0.lose(3, "gave no sign of life for 20 s (worker_timeout)")
    if not meanwhile:
        lose_sight(host_1)

    host_1.restarted(1)

    assert [index for index, _ in host_1.started] == [1]


def test_what_is_said_again_to_a_host_that_was_away_ends_no_rank_that_was_started_since(host_1: Host1) -> None:
    host_1.begin_training()
    host_1.die(1)
    again = host_1.restarted(1)
    (launcher,) = host_1.rank_0.launchers._launchers

    # It is about to join, and not in the run.
    host_1.rank_0.launchers._tell(launcher, host_1.rank_0.launchers._words[3])

    assert host_1.waiting.waits()
    assert again.is_alive() and len(host_1.started) == 1


def test_it_does_not_wait_for_rank_0_without_an_end(host_1: Host1, capfd: pytest.CaptureFixture[str]) -> None:
    host_1.mailbox.put(replace(host_1.rank_0.address, timeout_s=0.3))
    assert eventually(lambda: host_1.rank_0.launchers._launchers)

    lose_sight(host_1)

    error = host_1.waiting.ended()
    assert isinstance(error, WorkerFailedError) and error.failure == SILENT
    told = "rank 0 cannot be reached; if it can within 0.3 s, this host's ranks are started again"
    assert f"[host 1] lightning_async: {told}" in capfd.readouterr().err


def test_a_rank_0_that_is_gone_is_not_waited_for(host_1: Host1) -> None:
    host_1.begin_training()
    host_1.rank_0.latch.trip(SILENT)
    host_1.rank_0.launchers.close()

    lose_sight(host_1)

    error = host_1.waiting.ended()
    assert isinstance(error, WorkerFailedError) and error.failure == SILENT
