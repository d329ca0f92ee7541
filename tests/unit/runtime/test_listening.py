"""Rank 0 listens where its ranks reach it, and nowhere else if that can be."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from lightning_async.runtime import listening
from lightning_async.runtime.listening import PORTS_VARIABLE, allowed_ports, listen, reserved


@contextmanager
def listening_at(host: str, **options: Any) -> Iterator[list[str]]:
    sockets = listen(host, **options)
    try:
        yield [str(sock.getsockname()[0]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def resolving(*addresses: str) -> Callable[..., Any]:
    def resolve(host: str, port: Any, **options: Any) -> Any:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(family, 1, 6, "", (address, 0)) for family, address in zip(families, addresses, strict=True)]

    return resolve


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_an_address_is_listened_at_alone(host: str) -> None:
    with listening_at(host) as addresses:
        assert addresses == [host]


@pytest.mark.parametrize(
    "resolved",
    [
        # Debian's, for a host's own name; the other hosts know it by another one.
        ["127.0.1.1"],
        # Of a service or another network: no interface of this host has it.
        ["192.0.2.7"],
        ["127.0.1.1", "192.0.2.7"],
    ],
)
def test_where_the_own_address_is_not_known_every_interface_is_listened_at(
    resolved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving(*resolved))

    with listening_at("node0") as addresses:
        assert addresses in (["::"], ["0.0.0.0"])


def test_a_name_that_cannot_be_resolved_here_is_listened_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    with listening_at("node0") as addresses:
        assert addresses in (["::"], ["0.0.0.0"])


def test_a_name_with_addresses_of_both_kinds_is_listened_for_at_both_and_one_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving("127.0.0.1", "::1"))
    sockets = listen("localhost")

    assert {sock.getsockname()[0] for sock in sockets} == {"127.0.0.1", "::1"}
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


def test_the_first_free_port_of_the_range_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(listening, "allowed_ports", lambda: range(port, port + 20))
        (sock,) = listen("127.0.0.1")
        assert port < sock.getsockname()[1] < port + 20
        sock.close()

        with pytest.raises(OSError, match=f"no port from {port} to {port} is free .LIGHTNING_ASYNC_PORTS"):
            listen("127.0.0.1", ports=range(port, port + 1))


@pytest.mark.parametrize(("text", "ports"), [("", [0]), ("29600", [29600]), (" 29600-29602 ", [29600, 29601, 29602])])
def test_the_environment_says_which_ports(text: str, ports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PORTS_VARIABLE, text)

    assert list(allowed_ports()) == ports


@pytest.mark.parametrize("text", ["here", "29602-29600", "0-9", "65000-65536", "-5"])
def test_what_is_no_range_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PORTS_VARIABLE, text)

    with pytest.raises(ValueError, match=f"{PORTS_VARIABLE} must be a port or a range"):
        allowed_ports()


def test_a_reserved_port_is_given_to_nobody_else_but_rank_0_can_listen_there() -> None:
    with reserved(0) as port:
        # One that asks for this port without sharing it, as a connection that needs a port of its own would.
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False).get("key") == b"value"


def test_a_port_that_is_taken_is_left_to_who_has_it() -> None:
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        with reserved(taken) as port:
            assert port == taken
