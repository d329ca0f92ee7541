"""The reactor: many workers, one thread; nobody's slowness or silence holds another one up."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest
import torch

from lightning_async import AMSGrad
from lightning_async.data.ledger import Ledger
from lightning_async.exchange.reactor import Reactor
from lightning_async.exchange.session import Session, SessionError
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.layout import FlatLayout
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.transport.base import Buffers, ChannelClosedError
from lightning_async.transport.codec import encode
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError, pack_bitmap
from lightning_async.transport.message import Abort, Beat, Goodbye, Parameters, Pull, Push, Read, Refuse
from lightning_async.transport.shm import SharedMemoryChannel

pytestmark = pytest.mark.timeout(30)


class Office:
    """A reactor with ``workers`` sessions, and the other ends of their sockets."""

    def __init__(self, workers: int, max_staleness: int | None) -> None:
        self.optimizer = AMSGrad([torch.nn.Parameter(torch.ones(4))], lr=0.1)
        layout = FlatLayout([self.optimizer.param_groups[0]["params"]])
        self.latch = FailureLatch()
        self.staleness: list[int] = []
        self.holder = Holder(
            layout,
            torch.ones(4),
            [self.optimizer],
            StalenessBarrier(max_staleness),
            self.latch,
            lambda update: self.staleness.append(update.staleness),
        )
        self.ended: dict[int, BaseException | None] = {}
        self.failed: list[BaseException] = []
        self.reactor = Reactor(
            self.holder, lambda session, error: self.ended.update({session.worker: error}), self.failed.append
        )
        self.sockets: list[socket.socket] = []
        self.ends: list[ControlConnection] = []
        ledger = Ledger(workers)
        for worker in range(workers):
            listener = socket.create_server(("127.0.0.1", 0))
            mine = socket.create_connection(listener.getsockname())
            theirs = ControlConnection(listener.accept()[0])
            listener.close()
            self.sockets.append(mine)
            self.ends.append(ControlConnection(mine))
            self.ends[-1].settimeout(10.0)
            channel = SharedMemoryChannel(theirs, Buffers.allocate(4, torch.float32))
            self.reactor.add(
                Session(worker, channel, self.holder, ledger, layout, [HyperparamLayout(self.optimizer)]), theirs
            )

    def push(self, worker: int, version: int) -> Push:
        return Push(
            worker=worker,
            version=version,
            dtype=torch.float32,
            payload_bytes=16,
            hyperparams=HyperparamReader(self.optimizer, HyperparamLayout(self.optimizer)).packed(),
            present=pack_bitmap([True]),
        )

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
def negotiator(request: pytest.FixtureRequest) -> Any:
    built = Office(*request.param)
    yield built
    built.close()


def has_answer(sock: socket.socket, within_s: float = 0.2) -> bool:
    sock.settimeout(within_s)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("negotiator", [(3, 1)], indirect=True)
def test_a_held_back_push_waits_while_others_are_served_and_goes_on_after_them(negotiator: Office) -> None:
    assert (negotiator.pull(0), negotiator.pull(1)) == (0, 0)
    negotiator.ends[0].send(negotiator.push(0, version=0))
    assert negotiator.version(0) == 1
    # Worker 1's gradient of version 0 would be two updates stale.
    negotiator.ends[0].send(negotiator.push(0, version=1))
    negotiator.ends[2].send(Read(worker=2))
    assert negotiator.version(2) == 1
    assert not has_answer(negotiator.sockets[0])

    negotiator.ends[1].send(negotiator.push(1, version=0))

    assert negotiator.version(0) == 3
    assert negotiator.staleness == [0, 1, 1]


@pytest.mark.parametrize("negotiator", [(2, 0)], indirect=True)
def test_a_change_in_another_thread_wakes_who_was_held_back(negotiator: Office) -> None:
    out = torch.empty(4)
    assert negotiator.holder.try_pull(0, out) == 0
    negotiator.ends[1].send(Pull(worker=1))
    assert not has_answer(negotiator.sockets[1])

    negotiator.holder.leave(0)

    assert negotiator.version(1) == 0


@pytest.mark.parametrize("negotiator", [(2, None)], indirect=True)
def test_half_a_message_keeps_nobody_else_waiting(negotiator: Office) -> None:
    data = encode(Pull(worker=0))
    negotiator.sockets[0].sendall(data[:50])

    assert negotiator.pull(1) == 0

    negotiator.sockets[0].sendall(data[50:])
    assert isinstance(negotiator.ends[0].receive(), Parameters)


@pytest.mark.parametrize("negotiator", [(2, 0)], indirect=True)
def test_a_failure_is_told_to_who_was_held_back(negotiator: Office) -> None:
    assert negotiator.pull(0) == 0
    negotiator.ends[1].send(Pull(worker=1))
    assert not has_answer(negotiator.sockets[1])

    negotiator.latch.trip(RunFailure(0, "it ran out of memory"))

    reply = negotiator.ends[1].receive()
    assert reply == Abort(worker=0, reason="it ran out of memory")
    wait_for(lambda: isinstance(negotiator.ended.get(1), WorkerFailedError))


@pytest.mark.parametrize("negotiator", [(3, 0)], indirect=True)
def test_every_way_to_end_a_session_ends_that_one_alone(negotiator: Office) -> None:
    negotiator.ends[0].send(Goodbye(worker=0))
    negotiator.sockets[1].sendall(b"x" * 128)
    wait_for(lambda: len(negotiator.ended) == 2)
    assert negotiator.ended[0] is None
    assert isinstance(negotiator.ended[1], WireError)

    assert negotiator.pull(2) == 0
    negotiator.ends[2].send(Beat(worker=2))
    assert isinstance(negotiator.ends[2].receive(), Refuse)
    wait_for(lambda: isinstance(negotiator.ended.get(2), SessionError))


@pytest.mark.parametrize("negotiator", [(2, 0)], indirect=True)
def test_a_worker_that_does_not_wait_for_its_answer_is_refused(negotiator: Office) -> None:
    assert negotiator.pull(0) == 0
    negotiator.ends[1].send(Pull(worker=1))
    negotiator.ends[1].send(Read(worker=1))

    wait_for(lambda: isinstance(negotiator.ended.get(1), WireError))


@pytest.mark.parametrize("negotiator", [(2, None)], indirect=True)
def test_a_lost_worker_ends_its_session(negotiator: Office) -> None:
    negotiator.ends[0].close()

    wait_for(lambda: isinstance(negotiator.ended.get(0), ChannelClosedError))


def test_all_sessions_share_one_thread_and_closing_ends_it() -> None:
    before = threading.active_count()
    negotiator = Office(8, None)
    assert [negotiator.pull(worker) for worker in range(8)] == [0] * 8
    during = threading.active_count()

    negotiator.close()

    assert (during, threading.active_count()) == (before + 1, before)


@pytest.mark.parametrize("negotiator", [(2, None)], indirect=True)
def test_a_reactor_that_fails_says_so(negotiator: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers would wait for ever."""

    def out_of_memory() -> None:
        raise MemoryError

    monkeypatch.setattr(negotiator.reactor, "_resume", out_of_memory)
    negotiator.ends[0].send(Pull(worker=0))
    deadline = time.monotonic() + 5.0
    while not negotiator.failed and time.monotonic() < deadline:
        time.sleep(0.01)

    assert [type(error) for error in negotiator.failed] == [MemoryError]
