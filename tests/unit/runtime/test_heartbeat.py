"""The heartbeat notices a peer's end within milliseconds, its silence after the time-out, and nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_async.runtime import heartbeat as heartbeat
from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.codec import encode
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Abort, Beat, Evict, Goodbye, Message, Push
from tests.harness import eventually, socket_pair

pytestmark = pytest.mark.timeout(30)
# Long enough that nothing in these tests times out by itself.
PATIENT_S = 60.0


class Peers:
    """Makes heartbeats and the connections between them, and closes what is left."""

    def __init__(self) -> None:
        self.connections: list[ControlConnection] = []
        self.heartbeats: list[Heartbeats] = []

    def connection_pair(self) -> tuple[ControlConnection, ControlConnection]:
        mine, theirs = map(ControlConnection, socket_pair())
        self.connections += [mine, theirs]
        return mine, theirs

    def process(
        self,
        rank: int,
        timeout_s: float = PATIENT_S,
        describe_end: Callable[[int], str | None] = lambda rank: None,
        **arguments: Any,
    ) -> tuple[Heartbeats, FailureLatch]:
        latch = FailureLatch()
        lines = Heartbeats(rank, latch, timeout_s, describe_end, **arguments)
        self.heartbeats.append(lines)
        return lines, latch

    def tie(self, holder: Heartbeats, worker: Heartbeats, rank: int) -> None:
        """A heartbeat between rank 0 and a worker."""
        mine, theirs = self.connection_pair()
        holder.add(rank, mine)
        worker.add(0, theirs)


@pytest.fixture
def peers() -> Iterator[Peers]:
    peers = Peers()
    yield peers
    for lines in peers.heartbeats:
        lines.close()
    for connection in peers.connections:
        connection.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeats"]


def silent_peer(peers: Peers, lines: Heartbeats, rank: int = 2) -> ControlConnection:
    """A peer that the test speaks for."""
    mine, theirs = peers.connection_pair()
    lines.add(rank, mine)
    return theirs


def test_a_connection_that_ends_is_a_lost_rank(peers: Peers) -> None:
    lines, latch = peers.process(0)
    peer = silent_peer(peers, lines)

    peer.close()

    # Not its silence, which would take PATIENT_S to notice.
    assert latch.wait(5.0) == RunFailure(2, "its process is gone: the connection was closed")


def test_the_reason_is_the_exit_status_where_it_is_known(peers: Peers) -> None:
    lines, latch = peers.process(0, describe_end=lambda rank: f"rank {rank}'s exit status")
    silent_peer(peers, lines).close()

    assert latch.wait(5.0) == RunFailure(2, "rank 2's exit status")


def test_a_goodbye_is_no_failure(peers: Peers) -> None:
    holder, latch = peers.process(0)
    worker, worker_latch = peers.process(1)
    peers.tie(holder, worker, 1)

    worker.close()

    assert eventually(lambda: not holder.watches(1))
    assert latch.failure is None
    assert worker_latch.failure is None


def test_silence_is_a_failure_after_the_time_out_and_not_before(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(heartbeat, "time", clock)
    lines, latch = peers.process(0, timeout_s=60.0)
    peer = silent_peer(peers, lines)
    peer.settimeout(5.0)

    for clock.now in (15.0, 30.0, 45.0, 60.0):
        lines._wake()
        # Its own beat says that rank 0 has looked.
        assert isinstance(peer.receive(), Beat)
    assert latch.failure is None
    clock.now = 60.1
    lines._wake()

    assert latch.wait(5.0) == RunFailure(2, "gave no sign of life for 60 s (worker_timeout)")


def test_beats_are_signs_of_life(peers: Peers) -> None:
    holder, latch = peers.process(0, timeout_s=0.6)
    worker, worker_latch = peers.process(1, timeout_s=0.6)
    peers.tie(holder, worker, 1)

    assert latch.wait(2.0) is None
    assert worker_latch.failure is None


def test_who_was_stopped_itself_blames_nobody(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = 0.0
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + skipped))
    lines, latch = peers.process(0, timeout_s=4.0)
    silent_peer(peers, lines)
    time.sleep(0.2)

    skipped = 100.0  # as after SIGCONT: its peers' beats of that time have yet to be read

    assert latch.wait(2.0) is None


def test_one_ranks_failure_reaches_all_the_others(peers: Peers) -> None:
    holder, holder_latch = peers.process(0)
    workers = {rank: peers.process(rank) for rank in (1, 2, 3)}
    for rank, (lines, _) in workers.items():
        peers.tie(holder, lines, rank)

    workers[2][1].trip(RunFailure(2, "ValueError: no", announced=True))

    assert holder_latch.wait(5.0) == RunFailure(2, "ValueError: no")
    for rank in (1, 3):
        # Rank 0 tells the user.
        assert workers[rank][1].wait(5.0) == RunFailure(2, "ValueError: no", announced=True)


def test_a_failure_of_rank_0_reaches_all(peers: Peers) -> None:
    holder, holder_latch = peers.process(0)
    lines, latch = peers.process(1)
    peers.tie(holder, lines, 1)

    holder_latch.trip(RunFailure(0, "ValueError: \udcff no"))

    assert latch.wait(5.0) == RunFailure(0, "ValueError: ? no", announced=True)


def test_a_rank_at_fault_that_still_lives_is_told_too(peers: Peers) -> None:
    """Rank 0 refused its request, and it may be waiting for an answer."""
    holder, holder_latch = peers.process(0)
    lines, latch = peers.process(1)
    peers.tie(holder, lines, 1)

    holder_latch.trip(RunFailure(1, "worker 1 refused: it sends 2 param groups"))

    assert latch.wait(5.0) == RunFailure(1, "worker 1 refused: it sends 2 param groups", announced=True)


def test_the_end_of_the_rank_that_reported_its_failure_is_no_news(peers: Peers) -> None:
    described: list[int] = []
    lines, latch = peers.process(0, describe_end=lambda rank: described.append(rank))
    peer = silent_peer(peers, lines)

    peer.send(Abort(worker=2, reason="ValueError: no"))
    peer.close()

    assert latch.wait(5.0) == RunFailure(2, "ValueError: no")
    assert eventually(lambda: not lines.watches(2))
    assert described == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0" * 128, "Expected a lightning_async message"),
        (encode(Push(worker=2)), "unexpected PUSH on a heartbeat"),
    ],
)
def test_what_is_no_lifeline_is_named(peers: Peers, data: bytes, reason: str) -> None:
    lines, latch = peers.process(0)
    peer = silent_peer(peers, lines)

    peer._socket.sendall(data)

    failure = latch.wait(5.0)
    assert failure is not None
    assert failure.rank == 2
    assert failure.reason.startswith("its heartbeat does not follow the protocol")
    assert reason in failure.reason


def test_messages_may_arrive_in_pieces(peers: Peers) -> None:
    lines, latch = peers.process(0)
    peer = silent_peer(peers, lines)
    data = encode(Beat(worker=2)) + encode(Abort(worker=2, reason="ValueError: no"))

    for start in range(0, len(data), 50):
        peer._socket.sendall(data[start : start + 50])
        time.sleep(0.01)

    assert latch.wait(5.0) == RunFailure(2, "ValueError: no")


def test_a_peer_that_does_not_read_holds_nobody_up(peers: Peers) -> None:
    lines, latch = peers.process(0, timeout_s=1.0)
    stuck = silent_peer(peers, lines, rank=1)
    stuck._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    other = silent_peer(peers, lines, rank=2)

    other.close()

    assert latch.wait(5.0) == RunFailure(2, "its process is gone: the connection was closed")


def next_news(peer: ControlConnection) -> Message:
    """What comes that is no beat."""
    peer.settimeout(5.0)
    while isinstance(message := peer.receive(), Beat):
        continue
    return message


def test_who_has_no_memory_to_say_more_says_so_much(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, latch = peers.process(1)
    peer = silent_peer(peers, lines, rank=0)

    def out_of_memory(message: Message) -> bytes:
        raise MemoryError

    monkeypatch.setattr(heartbeat, "encode", out_of_memory)
    latch.trip(RunFailure(1, "ValueError: a long story", announced=True))

    assert next_news(peer) == Abort(worker=1, reason="out of memory")


def test_a_peer_that_could_not_be_told_is_told_with_the_next_sign_of_life(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, latch = peers.process(1, timeout_s=1.0)
    peer = silent_peer(peers, lines, rank=0)
    tell = Heartbeats._tell
    tries: list[int] = []

    def fail_once(self: Heartbeats, *arguments: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise MemoryError
        tell(self, *arguments)

    monkeypatch.setattr(Heartbeats, "_tell", fail_once)
    latch.trip(RunFailure(1, "ValueError: no", announced=True))

    assert next_news(peer) == Abort(worker=1, reason="ValueError: no")


def test_a_part_that_has_failed_does_not_leave_with_a_goodbye_alone(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, latch = peers.process(1)
    peer = silent_peer(peers, lines, rank=0)
    monkeypatch.setattr(lines, "_pass_on", lambda failure: None)
    latch.trip(RunFailure(1, "ValueError: no", announced=True))

    lines.close()

    assert next_news(peer) == Abort(worker=1, reason="ValueError: no")


def test_there_is_no_sign_of_life_after_a_failure(peers: Peers) -> None:
    # A beat each half second, for the two seconds that the peer may be silent.
    lines, latch = peers.process(1, timeout_s=2.0)
    peer = silent_peer(peers, lines, rank=0)
    latch.trip(RunFailure(1, "ValueError: no", announced=True))
    assert isinstance(next_news(peer), Abort)

    peer.settimeout(1.2)
    with pytest.raises(ChannelClosedError, match="timed out"):
        peer.receive()


@pytest.mark.parametrize("rank", [0, 1])
def test_who_can_watch_over_nobody_any_more_has_failed(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    lines, latch = peers.process(rank)
    peer = silent_peer(peers, lines, rank=2)

    def out_of_memory(peer: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(lines, "_read", out_of_memory)
    peer.send(Beat(worker=2))

    reason = "MemoryError: out of memory (while it watched over the other ranks)"
    assert latch.wait(5.0) == RunFailure(rank, reason, announced=rank != 0)
    assert next_news(peer) == Abort(worker=rank, reason=reason)


def test_closing_twice_is_closing(peers: Peers) -> None:
    lines, latch = peers.process(0)
    peer = silent_peer(peers, lines)

    lines.close()
    lines.close()

    peer.settimeout(5.0)
    assert isinstance(next_news(peer), Goodbye)
    assert latch.failure is None


# --- where the run goes on without ranks that it loses ----------------------------------------------------------------


def going_on(peers: Peers, **arguments: Any) -> tuple[Heartbeats, FailureLatch, list[RunFailure]]:
    """Rank 0, which is told of the ranks that are lost and takes them out."""
    lost: list[RunFailure] = []

    def lose(failure: RunFailure) -> None:
        lost.append(failure)
        lines.evict(failure.rank, failure.reason)

    lines, latch = peers.process(0, on_lost=lose, **arguments)
    return lines, latch, lost


def test_a_rank_that_is_lost_is_news_for_the_others_and_no_failure(peers: Peers) -> None:
    lines, latch, lost = going_on(peers)
    heard: list[RunFailure] = []
    other, other_latch = peers.process(1, on_evicted=heard.append)
    peers.tie(lines, other, 1)

    silent_peer(peers, lines, rank=2).close()

    reason = "its process is gone: the connection was closed"
    assert eventually(lambda: heard == [RunFailure(2, reason, announced=True)])
    assert lost == [RunFailure(2, reason)]
    assert (latch.failure, other_latch.failure) == (None, None)
    assert eventually(lambda: not lines.watches(2)) and lines.watches(1)


def test_a_rank_that_was_only_silent_is_told_that_it_is_out(peers: Peers) -> None:
    lines, latch, lost = going_on(peers, timeout_s=0.4)
    peer = silent_peer(peers, lines)

    reason = "gave no sign of life for 0.4 s (worker_timeout)"
    assert next_news(peer) == Evict(worker=2, reason=reason)
    assert lost == [RunFailure(2, reason)]
    assert latch.failure is None
    with pytest.raises(ChannelClosedError):
        peer.receive()


def test_a_rank_that_has_failed_is_judged_by_what_it_says_of_itself(peers: Peers) -> None:
    failed: list[RunFailure] = []
    lines, latch, lost = going_on(peers, on_failed=failed.append)

    silent_peer(peers, lines, 1).send(Abort(worker=1, reason="MemoryError: out of memory"))

    assert eventually(lambda: failed)
    assert failed == [RunFailure(1, "MemoryError: out of memory")]
    assert (lost, latch.failure) == ([], None)
    assert not lines.watches(1)


def test_a_rank_that_passes_on_anothers_end_is_not_taken_for_it(peers: Peers) -> None:
    failed: list[RunFailure] = []
    lines, latch, lost = going_on(peers, on_failed=failed.append)

    silent_peer(peers, lines, 1).send(Abort(worker=2, reason="MemoryError: out of memory"))

    assert latch.wait(5.0) == RunFailure(2, "MemoryError: out of memory")
    assert (lost, failed) == ([], [])


def test_a_goodbye_is_no_loss(peers: Peers) -> None:
    lines, latch, lost = going_on(peers)

    silent_peer(peers, lines).send(Goodbye(2))

    assert eventually(lambda: not lines.watches(2))
    assert (lost, latch.failure) == ([], None)


def test_the_next_incarnation_is_not_forgotten_for_the_one_before(peers: Peers) -> None:
    """A lost rank may be back before all that is done about its loss is done."""
    back: list[ControlConnection] = []

    def lose(failure: RunFailure) -> None:
        lines.evict(failure.rank, failure.reason)
        if not back:
            back.append(silent_peer(peers, lines))

    # A beat each half second.
    lines, latch = peers.process(0, timeout_s=2.0, on_lost=lose)
    silent_peer(peers, lines).close()

    assert eventually(lambda: back)
    back[0].send(Beat(2))
    back[0].settimeout(5.0)
    assert isinstance(back[0].receive(), Beat)
    assert lines.watches(2)
    assert latch.failure is None
