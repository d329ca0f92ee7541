"""A listener whose process is out of descriptors, threads or memory for a while stays a listener."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from lightning_async.exchange.negotiation import dial
from lightning_async.holder.layout import describe_model
from lightning_async.runtime import listener as frontdoor
from lightning_async.runtime.handshake import CONTROL, HEARTBEAT, HandshakeError, handshake
from tests.faults.host import Host

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(frontdoor, "_LONGEST_PAUSE_S", 0.1)
    host = Host()
    yield host
    host.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record for record in caplog.records if record.levelno == logging.WARNING]
    return [record.getMessage() for record in found if "cannot take connections" in record.getMessage()]


class FailingListener:
    """A listening socket whose next ``accept`` calls fail; the peer stays in its queue."""

    def __init__(self, listener: socket.socket, errors: list[BaseException]) -> None:
        self._listener = listener
        self._errors = errors

    def accept(self) -> Any:
        if self._errors:
            raise self._errors.pop(0)
        return self._listener.accept()

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM"])
def test_a_rank_that_could_not_be_taken_is_taken_later_and_said_once(
    host: Host, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(errno, code)
    errors: list[BaseException] = [OSError(number, os.strerror(number)) for _ in range(4)]
    host.listener._sockets = [FailingListener(host.listener._sockets[0], errors)]  # type: ignore[list-item]

    assert host.serves(rank=1)
    assert errors == []
    (warning,) = warnings_of(caplog)
    assert os.strerror(number) in warning
    assert "ulimit -n" in warning
    assert host.stats.refused == 0


def test_out_of_memory_is_survived_too(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.listener._sockets = [FailingListener(host.listener._sockets[0], [MemoryError()])]  # type: ignore[list-item]

    assert host.serves(rank=1)
    assert len(warnings_of(caplog)) == 1


def test_a_visitor_that_has_gone_again_is_no_trouble(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    gone = [OSError(errno.ECONNABORTED, "aborted"), OSError(errno.EAGAIN, "again")]
    host.listener._sockets = [FailingListener(host.listener._sockets[0], [*gone])]  # type: ignore[list-item]

    assert host.serves(rank=1)
    assert warnings_of(caplog) == []


@contextmanager
def no_descriptors() -> Iterator[Callable[[], None]]:
    """This process can open nothing more; gives what ends that."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest + 40, before[0]), before[1]))
    held: list[int] = []

    def release() -> None:
        while held:
            os.close(held.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    try:
        with suppress(OSError):
            while True:
                held.append(os.dup(0))
        yield release
    finally:
        release()


def test_without_a_descriptor_the_door_waits_for_one(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    worker = socket.socket()
    with no_descriptors() as release:
        worker.connect((host.listener.address.host, host.listener.address.port))
        deadline = time.monotonic() + 10.0
        while not warnings_of(caplog) and time.monotonic() < deadline:
            time.sleep(0.02)
        release()
    worker.close()

    assert host.serves(rank=1)
    assert len(warnings_of(caplog)) == 1
    assert "Too many open files" in warnings_of(caplog)[0]


def test_who_has_waited_for_long_is_told_why(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frontdoor, "_LONGEST_TROUBLES_S", 0.2)
    worker = socket.socket()
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout=None: (worker.connect(address), worker)[1])
    with no_descriptors() as release:
        with pytest.raises(HandshakeError, match=r"rank 0 cannot take connections: .*Too many open files.*ulimit -n"):
            handshake(host.listener.address, 1, HEARTBEAT)
        release()
    monkeypatch.undo()

    assert host.stats.refused == 1
    assert host.latch.failure is None
    assert host.serves(rank=1)


def test_without_a_thread_a_lifeline_is_taken_and_a_doorbell_is_told_why(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        heartbeat = handshake(host.listener.address, 1, HEARTBEAT)[0]
        with pytest.raises(HandshakeError, match="rank 0 could not serve it: RuntimeError: can't start new thread"):
            handshake(host.listener.address, 1, CONTROL, model=describe_model(host.layout, host.groups))

    assert host.heartbeats.watches(1)
    assert host.latch.failure is None
    dial(host.listener.address, 2, host.layout, host.groups).close()
    heartbeat.close()


def test_a_door_closes_in_need(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    with no_descriptors():
        host.listener.close()

    assert not [thread for thread in threading.enumerate() if thread.name == "listener" and thread.is_alive()]
    host.close()
