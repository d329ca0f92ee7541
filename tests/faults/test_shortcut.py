"""Doorbells on one host move to a Unix socket, where that can be had, and to nobody else's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_async.exchange import negotiation as channels
from lightning_async.exchange.negotiation import dial
from lightning_async.transport import unix_socket as shortcut
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Ack, Beat, Draw, Tickets
from lightning_async.transport.shm import SharedMemoryChannel
from lightning_async.transport.unix_socket import Shortcut, find_shortcut
from tests.faults.host import Host

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def family_of(channel: object) -> int:
    """How the messages of a channel travel."""
    assert isinstance(channel, SharedMemoryChannel)
    return channel._control._socket.family


def test_a_worker_in_shared_memory_talks_over_a_unix_socket_that_leaves_no_way_in(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(channels, "find_shortcut", lambda name: (names.append(name), find_shortcut(name))[1])

    channel = dial(host.listener.address, 1, host.layout, host.groups)

    assert family_of(channel) == socket.AF_UNIX
    # Once it has an answer, rank 0's side is through the listener, too.
    channel.send(Draw(worker=1))
    assert isinstance(channel.receive(), Tickets)
    assert [find_shortcut(name) for name in names] == [None]
    channel.close()


def test_without_such_sockets_it_stays_with_tcp(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Shortcut:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(channels, "Shortcut", refuse)

    channel = dial(host.listener.address, 1, host.layout, host.groups)

    assert family_of(channel) == socket.AF_INET
    channel.close()


def test_a_worker_that_cannot_reach_it_stays_with_tcp(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "find_shortcut", lambda name: find_shortcut(f"{name} of another network"))

    channel = dial(host.listener.address, 1, host.layout, host.groups)

    assert family_of(channel) == socket.AF_INET
    channel.send(Draw(worker=1))
    assert isinstance(channel.receive(), Tickets)
    channel.close()


def test_a_worker_that_loses_rank_0_while_they_agree_leaves_no_socket_open(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, find, send = channels.handshake, channels.find_shortcut, ControlConnection.send
    connections: list[ControlConnection] = []
    shortcuts: list[Any] = []

    def keep(*args: Any, **claims: Any) -> Any:
        connection, offer = connect(*args, **claims)
        connections.append(connection)
        return connection, offer

    def lose(connection: ControlConnection, message: Any) -> None:
        if isinstance(message, Ack):
            raise ChannelClosedError("rank 0 is gone")
        send(connection, message)

    monkeypatch.setattr(channels, "handshake", keep)
    monkeypatch.setattr(channels, "find_shortcut", lambda name: (shortcuts.append(find(name)), shortcuts[-1])[1])
    monkeypatch.setattr(ControlConnection, "send", lose)

    with pytest.raises(ChannelClosedError, match="rank 0 is gone"):
        dial(host.listener.address, 1, host.layout, host.groups)

    assert [end.fileno() for end in (*connections, *shortcuts)] == [-1, -1]


def test_another_user_is_sent_away_and_the_worker_is_let_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    users = iter([12345])
    own = shortcut._user_of
    monkeypatch.setattr(shortcut, "_user_of", lambda sock: next(users, own(sock)))
    here = Shortcut()
    stranger, worker = find_shortcut(here.name), find_shortcut(here.name)
    assert stranger is not None
    assert worker is not None

    taken = here.take()

    worker.sendall(b"mine")
    assert taken.recv(4) == b"mine"
    assert stranger.recv(1) == b""
    assert "a process of another user came to lightning_async-" in caplog.text
    for sock in (stranger, worker, taken):
        sock.close()
    here.close()


def test_who_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "_ARRIVAL_TIMEOUT_S", 0.05)
    here = Shortcut()

    with pytest.raises(ChannelClosedError, match="has not come to the shortcut"):
        here.take()

    here.close()
    assert find_shortcut(here.name) is None


def test_a_connection_goes_on_over_another_socket() -> None:
    (old, other_old), (new, other_new) = socket.socketpair(), socket.socketpair()
    old.settimeout(7.0)
    connection, other = ControlConnection(old), ControlConnection(other_old)
    connection.move_to(new)
    other.move_to(other_new)

    sender = threading.Thread(target=lambda: other.send(Beat(worker=2)))
    sender.start()

    assert connection.receive().worker == 2
    assert new.gettimeout() == 7.0
    assert old.fileno() == -1
    sender.join()
    connection.close()
    other.close()
