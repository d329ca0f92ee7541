"""Ranks find rank 0 by either version of IP, by name and address; and what goes over the wire gives nobody a way in."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from lightning_async.runtime.listening import listen
from tests.hosts.network import Link, two_hosts
from tests.hosts.test_links import Run

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    with two_hosts(**getattr(request, "param", {})) as link:
        yield link


@pytest.mark.parametrize(
    ("link", "address"), [({}, "10.77.0.1"), ({}, "fd77::1"), ({"v4": False}, "fd77::1")], indirect=["link"]
)
def test_ranks_of_two_hosts_train_over_either_version_of_ip(link: Link, address: str) -> None:
    run = Run(link, timeout_s=30.0, numel=1000, address=address)

    run.train(updates=2)

    assert run.host.holder.version == 2
    assert [sock.getsockname()[0] for sock in run.host.listener._sockets] == [address]
    run.close()


def resolves_to(*addresses: str) -> Callable[..., Any]:
    """A name server, or /etc/hosts; the hosts share a file system."""
    ask = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **options: Any) -> Any:
        names = addresses if host == "node0" else (host,)
        return [found for name in names for found in ask(name, *arguments, **options)]

    return resolve


@pytest.mark.parametrize(
    ("addresses", "at"),
    [
        (["10.77.0.1"], ["10.77.0.1"]),
        (["fd77::1", "10.77.0.1"], ["fd77::1", "10.77.0.1"]),
        # An address that a name server still has of a host's former life.
        (["10.77.0.9", "10.77.0.1"], ["10.77.0.1"]),
    ],
)
def test_ranks_find_rank_0_by_name(
    link: Link, addresses: list[str], at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolves_to(*addresses))
    sockets = link.a.run(lambda: listen("node0"))
    assert [sock.getsockname()[0] for sock in sockets] == at
    for sock in sockets:
        sock.close()
    monkeypatch.setattr(socket, "getaddrinfo", resolves_to(*at))

    run = Run(link, timeout_s=30.0, numel=1000, address="node0")
    run.train(updates=1)

    assert run.host.holder.version == 1
    run.close()


class Wiretap(threading.Thread):
    """Keeps all that passes b's interface."""

    def __init__(self, link: Link) -> None:
        super().__init__(daemon=True)
        every_protocol = socket.htons(3)
        self._socket = link.b.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, every_protocol))
        self._socket.bind(("eth0", 0))
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self.heard = bytearray()
        self.start()

    def run(self) -> None:
        while not self._over.is_set():
            with suppress(TimeoutError):
                self.heard += self._socket.recv(1 << 17)
        self._socket.close()

    def stop(self) -> bytes:
        self._over.set()
        self.join()
        return bytes(self.heard)


def test_the_token_is_never_on_the_wire(link: Link) -> None:
    tap = Wiretap(link)
    run = Run(link, timeout_s=30.0, numel=1000)
    run.train(updates=1)
    run.close()
    heard = tap.stop()

    # It has listened: gradients and parameters are not hidden.
    assert b'"role": "heartbeat"' in heard
    assert len(heard) > 8000
    assert run.host.listener.address.token.encode() not in heard
    assert bytes.fromhex(run.host.listener.address.token) not in heard
