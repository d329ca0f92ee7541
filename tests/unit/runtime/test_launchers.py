"""Rank 0 counts the restarts of every host's ranks, and their launchers hear of each once, in time or late."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lightning_async.runtime import launcher_connection
from lightning_async.runtime import launchers as room
from lightning_async.runtime.failure import RunFailure
from lightning_async.runtime.handshake import LAUNCHER, HandshakeError, handshake
from lightning_async.runtime.launcher_connection import Lost
from lightning_async.transport.base import ChannelClosedError
from tests.harness import Call, RankZero, eventually

pytestmark = pytest.mark.timeout(30)
KILLED, SIGKILL = "its process was killed by SIGKILL", -9


@pytest.fixture
def rank_0() -> Iterator[RankZero]:
    rank_0 = RankZero()
    yield rank_0
    rank_0.close()


def said(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err


def is_said(text: str, capfd: pytest.CaptureFixture[str]) -> bool:
    """Whether rank 0 says so soon, in another thread."""
    lines: list[str] = []
    for _ in range(30):
        # Seldom: what is said between pytest's read and its truncation would be lost.
        time.sleep(0.3)
        lines.append(said(capfd))
        if text in "".join(lines):
            return True
    return False


def test_a_host_is_told_to_start_its_lost_rank_again_and_rank_0_says_so_in_one_line(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = rank_0.connect()

    rank_0.lose(3)

    assert launcher.receive() == Lost(3, KILLED, "it is started again (1 of 3)", start=1, delay_s=0.0)
    assert said(capfd) == (
        f"[rank 0] lightning_async: rank 3 is lost: {KILLED}; 3 ranks go on without it; "
        "it is started again by host 1 (1 of 3)\n"
    )


def test_each_rank_has_its_own_count_and_back_off(rank_0: RankZero) -> None:
    launcher = rank_0.connect()
    words = []
    for rank in (3, 3, 2, 3, 3):
        rank_0.lose(rank)
        words.append(launcher.receive())
        rank_0.evictions.roster.add(rank)

    assert [word and (word.rank, word.start, word.delay_s) for word in words] == [
        (3, 1, 0.0),
        (3, 2, 1.0),
        (2, 1, 0.0),
        (3, 3, 2.0),
        (3, 0, 0.0),
    ]
    assert words[-1] and words[-1].told == "it is not started again (max_restarts=3)"


def test_a_rank_that_leaves_is_not_started_again_whatever_its_process_ends_with(rank_0: RankZero) -> None:
    launcher = rank_0.connect()

    rank_0.evictions.let_go(RunFailure(3, "it was told to end"))
    launcher.report(3, SIGKILL, 0)
    rank_0.lose(2)

    left, lost = launcher.receive(), launcher.receive()
    assert left and (left.rank, left.start, left.leaves) == (3, 0, True)
    assert lost and (lost.rank, lost.start, lost.leaves) == (2, 1, False)


def test_one_that_dies_before_it_has_joined_is_started_again_and_counted(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody but its launcher has seen it."""
    launcher = rank_0.connect()
    rank_0.lose(3)
    assert launcher.receive()

    launcher.report(3, SIGKILL, 1)

    assert launcher.receive() == Lost(3, KILLED, "it is started again in 1 s (2 of 3)", start=2, delay_s=1.0)
    told = f"rank 3, which was about to join, is lost: {KILLED}; it is started again by host 1 in 1 s (2 of 3)"
    assert is_said(told, capfd)


def test_one_that_ends_with_an_error_before_it_has_joined_is_not_started_again(rank_0: RankZero) -> None:
    launcher = rank_0.connect()
    rank_0.lose(3)
    assert launcher.receive()

    launcher.report(3, 1, 1)

    word = launcher.receive()
    assert word and (word.start, word.told) == (0, "it is not started again: that was an error of its own")


def test_the_end_of_a_process_that_is_known_to_be_lost_is_no_news(rank_0: RankZero) -> None:
    launcher = rank_0.connect()
    rank_0.lose(3)

    launcher.report(3, SIGKILL, 0)
    launcher.report(2, SIGKILL, 0)

    assert [word and (word.rank, word.start) for word in (launcher.receive(), launcher.receive())] == [(3, 1), (2, 1)]
    assert rank_0.evictions.roster.lost == [(3, KILLED), (2, KILLED)]


def test_a_report_in_the_middle_of_the_decision_does_not_count_twice(rank_0: RankZero) -> None:
    """Of a rank that has joined again and died: rank 0 and its launcher see that at the same time."""
    launcher = rank_0.connect()
    rank_0.lose(3)
    assert launcher.receive()
    rank_0.evictions.roster.add(3)
    reported: list[Call] = []

    def report(rank: int, reason: str) -> None:
        reported.append(Call(lambda: rank_0.launchers.hear(3, SIGKILL, 1)))
        assert reported[-1].waits()

    # When it is out, and nothing was said of its restart.
    rank_0.evictions.steps.append(report)
    rank_0.lose(3)

    assert reported[-1].outcome() is None
    assert rank_0.launchers._starts[3] == 2


def test_a_launcher_that_comes_after_the_loss_is_told_of_it(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str]
) -> None:
    rank_0.lose(3)
    rank_0.lose(2)
    rank_0.evictions.roster.add(2)

    launcher = rank_0.connect()

    word = launcher.receive()
    assert word and (word.rank, word.start) == (3, 1)
    # Before, nobody could know whether there is one.
    assert is_said("rank 3: it is started again by host 1 (1 of 3)", capfd)


def test_ranks_whose_launcher_is_gone_are_lost_for_good_and_that_is_said(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str]
) -> None:
    rank_0.connect().close()
    assert eventually(lambda: not rank_0.launchers._launchers)

    rank_0.lose(3)

    assert "3 ranks go on without it; it is not started again: what has started it is gone" in said(capfd)


def test_where_nothing_starts_ranks_again_nothing_is_said_of_it(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str]
) -> None:
    rank_0.connect((2,))

    rank_0.lose(3)

    assert said(capfd).endswith("3 ranks go on without it\n")


def test_a_launcher_that_cannot_start_ranks_says_why(rank_0: RankZero, capfd: pytest.CaptureFixture[str]) -> None:
    launcher = rank_0.connect(unable="it is not started again, since this is not the script's first run")

    rank_0.lose(3)

    word = launcher.receive()
    assert word and word.start == 0
    assert "it is not started again, since this is not the script's first run" in said(capfd)


def test_of_a_host_that_may_be_cut_off_no_more_is_said_than_is_known(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_0.connect()
    monkeypatch.setattr(room, "_SILENCE_S", 0.0)

    rank_0.lose(3)

    assert "it is started again by host 1 (1 of 3), once that is heard of again" in said(capfd)


def test_signs_of_life_keep_a_launcher_from_being_silent(rank_0: RankZero, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = rank_0.connect()
    (known,) = rank_0.launchers._launchers
    before = known.heard_at

    launcher.beat()
    monkeypatch.setattr(launcher_connection, "BEAT_S", 0.0)
    launcher.beat()

    assert eventually(lambda: known.heard_at > before)


def test_what_rank_0s_own_process_has_started_is_started_again_there(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str]
) -> None:
    words: list[Lost] = []
    rank_0.launchers.add_own((1,), words.append)

    rank_0.lose(1)
    rank_0.launchers.hear(1, SIGKILL, 0)

    assert [(word.rank, word.start) for word in words] == [(1, 1)]
    assert said(capfd).endswith("it is started again (1 of 3)\n")


def test_a_process_that_ends_before_training_ends_the_run(rank_0: RankZero) -> None:
    rank_0.evictions.under_way = False
    launcher = rank_0.connect()

    launcher.report(3, SIGKILL, 0)

    assert rank_0.latch.wait(10.0) == RunFailure(3, KILLED)


def test_the_orderly_end_of_a_run_is_told_and_a_failure_is_an_end_without_a_word(rank_0: RankZero) -> None:
    launcher, heeding = rank_0.connect(), rank_0.connect((1,))
    ended = Call(lambda: heeding.heed(lambda lost: None))
    assert ended.waits()

    rank_0.launchers.close()

    assert launcher.receive() is None
    assert ended.outcome() is None
    assert eventually(lambda: not rank_0.launchers._launchers)


def test_a_run_that_has_failed_says_no_word_of_its_end(rank_0: RankZero) -> None:
    launcher = rank_0.connect()
    rank_0.latch.trip(RunFailure(0, "ValueError: no"))

    rank_0.launchers.close()

    with pytest.raises(ChannelClosedError):
        launcher.receive()


def test_a_launcher_that_stops_heeds_no_more(rank_0: RankZero) -> None:
    launcher = rank_0.connect()
    heeding = Call(lambda: launcher.heed(lambda lost: None))
    assert heeding.waits()

    launcher.stop()

    assert heeding.outcome() is None
    assert eventually(lambda: not rank_0.launchers._launchers)


def test_one_that_does_not_say_what_it_has_started_is_refused(rank_0: RankZero) -> None:
    with pytest.raises(HandshakeError, match="it has started ranks 'all'"):
        handshake(rank_0.entrance.listener.address, 2, LAUNCHER, ranks="all")


def test_what_cannot_be_read_ends_the_connection(rank_0: RankZero) -> None:
    launcher = rank_0.connect()

    launcher._connection.send_encoded(b"\xff\xff\xff\xff")

    assert eventually(lambda: not rank_0.launchers._launchers)


def test_a_rank_that_falls_silent_while_it_joins_is_replaced(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_REPORT_S", 0.05)
    launcher = rank_0.connect()
    rank_0.lose(3)
    launcher.receive()

    rank_0.evictions.lose_joiner = rank_0.launchers.lose_joiner
    rank_0.evictions.lose_peer(RunFailure(3, "gave no sign of life for 2 s"))

    word = launcher.receive()
    assert word is not None and (word.start, word.delay_s) == (2, 1.0)
    told = (
        "rank 3, which was about to join, is lost: gave no sign of life for 2 s; it is started again by host 1 in 1 s"
    )
    assert is_said(told, capfd)


@pytest.mark.parametrize("known", ["reported", "in the run", "over"])
def test_one_whose_end_is_known_or_that_has_joined_is_not_replaced_twice(
    rank_0: RankZero, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    monkeypatch.setattr(room, "_REPORT_S", 0.3)
    launcher = rank_0.connect()
    rank_0.lose(3)
    launcher.receive()

    rank_0.launchers.lose_joiner(RunFailure(3, "its process is gone"))
    if known == "reported":
        launcher.report(3, SIGKILL, 1)
        word = launcher.receive()
        assert word is not None and word.start == 2
    elif known == "in the run":
        rank_0.evictions.roster.add(3)
    else:
        rank_0.launchers.close()

    assert not eventually(lambda: rank_0.launchers._starts[3] > (2 if known == "reported" else 1), 0.6)


@pytest.mark.parametrize("comes", [False, True])
def test_a_rank_that_never_comes_is_replaced(
    rank_0: RankZero, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setattr(room, "_REPORT_S", 0.05)
    monkeypatch.setattr(room, "_IMPORTS_S", 0.2)
    launcher = rank_0.connect()
    rank_0.launchers.has_come = lambda rank: comes
    rank_0.lose(3)
    launcher.receive()

    if comes:
        assert not eventually(lambda: rank_0.launchers._starts[3] > 1, 0.6)
    else:
        word = launcher.receive()
        assert word is not None and word.start == 2
        assert is_said("rank 3, which was about to join, is lost: has not reached rank 0 within 0.2 s; ", capfd)
