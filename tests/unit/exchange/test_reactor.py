"""The reactor: many workers, one thread; nobody's slowness or silence holds another one up."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch

from lightning_async.exchange.reactor import Reactor
from lightning_async.exchange.session import SessionError
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.transport.base import Buffers, ChannelClosedError
from lightning_async.transport.codec import encode
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Abort, Beat, Goodbye, Parameters, Pull, Read, Refuse
from lightning_async.transport.shm import SharedMemoryChannel
from tests.harness import Exchange, eventually, socket_pair

pytestmark = pytest.mark.timeout(30)


class Served:
    """A reactor with a session for each worker of an exchange, and the other ends of their sockets."""

    def __init__(self, workers: int, max_staleness: int | None) -> None:
        self.exchange = Exchange([4], workers=workers, barrier=StalenessBarrier(max_staleness))
        self.ended: dict[int, BaseException | None] = {}
        self.failed: list[BaseException] = []
        self.reactor = Reactor(
            self.exchange.holder,
            lambda session, error: self.ended.update({session.worker: error}),
            self.failed.append,
        )
        self.sockets: list[socket.socket] = []
        self.ends: list[ControlConnection] = []
        for worker in range(workers):
            mine, accepted = socket_pair()
            theirs = ControlConnection(accepted)
            self.sockets.append(mine)
            self.ends.append(ControlConnection(mine))
            self.ends[-1].settimeout(10.0)
            channel = SharedMemoryChannel(theirs, Buffers.allocate(4, torch.float32))
            self.reactor.add(self.exchange.session(worker, channel), theirs)

    def pull(self, worker: int) -> int:
        self.ends[worker].send(Pull(worker=worker))
        return self.version(worker)

    def version(self, worker: int) -> int:
        """Of the parameters that a worker is answered with."""
        answer = self.ends[worker].receive()
        assert isinstance(answer, Parameters)
        return answer.version

    def close(self) -> None:
        self.reactor.close(0.2)
        for end in self.ends:
            end.close()


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Any:
    built = Served(*request.param)
    yield built
    built.close()


def has_answer(sock: socket.socket, within_s: float = 0.2) -> bool:
    sock.settimeout(within_s)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False


@pytest.mark.parametrize("served", [(3, 1)], indirect=True)
def test_a_held_back_push_waits_while_others_are_served_and_goes_on_after_them(served: Served) -> None:
    assert (served.pull(0), served.pull(1)) == (0, 0)
    served.ends[0].send(served.exchange.push(0, version=0))
    assert served.version(0) == 1
    # Worker 1's gradient of version 0 would be two updates stale.
    served.ends[0].send(served.exchange.push(0, version=1))
    served.ends[2].send(Read(worker=2))
    assert served.version(2) == 1
    assert not has_answer(served.sockets[0])

    served.ends[1].send(served.exchange.push(1, version=0))

    assert served.version(0) == 3
    assert [update.staleness for update in served.exchange.updates] == [0, 1, 1]


@pytest.mark.parametrize("served", [(2, 0)], indirect=True)
def test_a_change_in_another_thread_wakes_who_was_held_back(served: Served) -> None:
    out = torch.empty(4)
    assert served.exchange.holder.try_pull(0, out) == 0
    served.ends[1].send(Pull(worker=1))
    assert not has_answer(served.sockets[1])

    served.exchange.holder.leave(0)

    assert served.version(1) == 0


@pytest.mark.parametrize("served", [(2, None)], indirect=True)
def test_half_a_message_keeps_nobody_else_waiting(served: Served) -> None:
    data = encode(Pull(worker=0))
    served.sockets[0].sendall(data[:50])

    assert served.pull(1) == 0

    served.sockets[0].sendall(data[50:])
    assert isinstance(served.ends[0].receive(), Parameters)


@pytest.mark.parametrize("served", [(2, 0)], indirect=True)
def test_a_failure_is_told_to_who_was_held_back(served: Served) -> None:
    assert served.pull(0) == 0
    served.ends[1].send(Pull(worker=1))
    assert not has_answer(served.sockets[1])

    served.exchange.latch.trip(RunFailure(0, "it ran out of memory"))

    reply = served.ends[1].receive()
    assert reply == Abort(worker=0, reason="it ran out of memory")
    assert eventually(lambda: isinstance(served.ended.get(1), WorkerFailedError))


@pytest.mark.parametrize("served", [(3, 0)], indirect=True)
def test_every_way_to_end_a_session_ends_that_one_alone(served: Served) -> None:
    served.ends[0].send(Goodbye(worker=0))
    served.sockets[1].sendall(b"x" * 128)
    assert eventually(lambda: len(served.ended) == 2)
    assert served.ended[0] is None
    assert isinstance(served.ended[1], WireError)

    assert served.pull(2) == 0
    served.ends[2].send(Beat(worker=2))
    assert isinstance(served.ends[2].receive(), Refuse)
    assert eventually(lambda: isinstance(served.ended.get(2), SessionError))


@pytest.mark.parametrize("served", [(2, 0)], indirect=True)
def test_a_worker_that_does_not_wait_for_its_answer_is_refused(served: Served) -> None:
    assert served.pull(0) == 0
    served.ends[1].send(Pull(worker=1))
    served.ends[1].send(Read(worker=1))

    assert eventually(lambda: isinstance(served.ended.get(1), WireError))


@pytest.mark.parametrize("served", [(2, None)], indirect=True)
def test_a_lost_worker_ends_its_session(served: Served) -> None:
    served.ends[0].close()

    assert eventually(lambda: isinstance(served.ended.get(0), ChannelClosedError))


def test_all_sessions_share_one_thread_and_closing_ends_it() -> None:
    before = threading.active_count()
    served = Served(8, None)
    assert [served.pull(worker) for worker in range(8)] == [0] * 8
    during = threading.active_count()

    served.close()

    assert (during, threading.active_count()) == (before + 1, before)


@pytest.mark.parametrize("served", [(2, None)], indirect=True)
def test_a_reactor_that_fails_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers would wait for ever."""

    def out_of_memory() -> None:
        raise MemoryError

    monkeypatch.setattr(served.reactor, "_resume", out_of_memory)
    served.ends[0].send(Pull(worker=0))

    assert eventually(lambda: served.failed)
    assert [type(error) for error in served.failed] == [MemoryError]


@pytest.mark.parametrize("served", [(1, None)], indirect=True)
def test_who_comes_while_it_stops_is_sent_away(served: Served) -> None:
    served.reactor.close(0.2)
    mine, accepted = socket_pair()
    late = ControlConnection(accepted)
    session = served.exchange.session(0, SharedMemoryChannel(late, Buffers.allocate(4, torch.float32)))

    with pytest.raises(ChannelClosedError, match="the run is over"):
        served.reactor.add(session, late)

    late.close()
    mine.close()


@pytest.mark.parametrize("served", [(1, None)], indirect=True)
def test_a_session_whose_end_fails_leaves_no_socket_open(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Any, error: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(served.reactor, "_on_ended", fail)
    served.ends[0].send(Goodbye(worker=0))

    assert served.sockets[0].recv(1) == b""
    assert eventually(lambda: served.failed)
