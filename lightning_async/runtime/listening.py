"""Which addresses and ports rank 0 listens at."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["PORTS_VARIABLE", "allowed_ports", "listen", "reserved"]

log = logging.getLogger(__name__)

PORTS_VARIABLE = "LIGHTNING_ASYNC_PORTS"
_BACKLOG = 256


def allowed_ports() -> Iterable[int]:
    """The ports that the environment variable `LIGHTNING_ASYNC_PORTS` allows; 0, any that is free, without it.

    Raises:
        ValueError: if its value is none.

    Examples:
        >>> os.environ[PORTS_VARIABLE] = "29600-29602"
        >>> list(allowed_ports())
        [29600, 29601, 29602]
        >>> del os.environ[PORTS_VARIABLE]
        >>> list(allowed_ports())
        [0]
    """
    text = os.environ.get(PORTS_VARIABLE, "").strip()
    if not text:
        return (0,)
    first, _, last = text.partition("-")
    try:
        ports = range(int(first), int(last or first) + 1)
    except ValueError:
        ports = range(0)
    if not ports or ports[0] < 1 or ports[-1] > 65535:
        raise ValueError(f'{PORTS_VARIABLE} must be a port or a range of them such as "29600-29650", not {text!r}.')
    return ports


def listen(host: str, ports: Iterable[int] | None = None) -> list[socket.socket]:
    """Sockets that listen at all addresses that a host's name stands for, and at one port.

    Where the name stands for this host's loopback address only (as Debian has it for a host's own name), or for an
    address that this host does not have (that of a Kubernetes service), they listen at every interface.

    Args:
        host: a name or address of this host, by which the other ranks reach it.
        ports: those to try; `allowed_ports` by default.

    Raises:
        OSError: if no port is free; the message says which were tried.

    Examples:
        >>> [here] = listen("127.0.0.1")
        >>> here.getsockname()[0]
        '127.0.0.1'
        >>> here.close()
    """
    candidates = list(allowed_ports() if ports is None else ports)
    addresses = _addresses(host)
    for port in candidates:
        found = list(_bound(addresses, port))
        if found:
            return found
    if candidates != [0]:
        raise OSError(
            errno.EADDRINUSE, f"no port from {candidates[0]} to {candidates[-1]} is free ({PORTS_VARIABLE})", host
        )
    raise OSError(errno.EADDRNOTAVAIL, "no address to listen at", host)


@contextmanager
def reserved(port: int) -> Iterator[int]:
    """Keeps a port of this host from being given to others until rank 0 listens at it, which it still may.

    Lightning and torch's launcher look for a free port, let go of it, and start processes that listen at it seconds
    later; by then the system may have given it to any connection. A socket that is bound and does not listen holds
    the port, and lets those share it that ask to (``SO_REUSEADDR``), as torch's stores do. Other systems than Linux do
    not let them, so that the port is only found there.

    Args:
        port: which one; 0 is any that is free. One that is taken is left as it is: who listens at it will say so.

    Yields:
        the port.

    Examples:
        >>> with reserved(0) as port, socket.create_server(("", port)) as server:
        ...     server.getsockname()[1] == port
        True
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holding:
        holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holding.bind(("", port))
        except OSError as error:
            log.debug("port %d cannot be reserved: %s", port, error)
        found = holding.getsockname()[1] or port
        if sys.platform != "linux":
            holding.close()
        yield found


def _addresses(host: str) -> list[tuple[int, str]]:
    """Families and addresses to bind; the empty address is every interface."""
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        log.info("lightning_async: %s cannot be resolved here (%s), so rank 0 listens at every interface", host, error)
        return [(socket.AF_UNSPEC, "")]
    found = list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in resolved))
    if host == "localhost" or _is_address(host):
        outside = found
    else:
        outside = [one for one in found if not ipaddress.ip_address(one[1].partition("%")[0]).is_loopback]
    mine = [one for one in outside if _is_mine(*one)]
    if mine:
        return mine
    log.info("lightning_async: %s is no address of an interface here, so rank 0 listens at every one", host)
    return [(socket.AF_UNSPEC, "")]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_mine(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(_place(family, address, 0))
    except OSError:
        return False
    return True


def _bound(addresses: list[tuple[int, str]], port: int) -> Iterator[socket.socket]:
    """Sockets at each address, at the port that the first one got."""
    for family, address in addresses:
        try:
            sock = _open(family, address, port)
        except OSError as error:
            log.debug("not listening at %s, port %d: %s", address or "every interface", port, error)
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EAFNOSUPPORT):
                raise
            continue
        port = sock.getsockname()[1]
        yield sock


def _open(family: int, address: str, port: int) -> socket.socket:
    if family == socket.AF_UNSPEC:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=_BACKLOG)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(_place(family, address, port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _place(family: int, address: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    if family != socket.AF_INET6:
        return address, port
    bare, _, scope = address.partition("%")
    return bare, port, 0, socket.if_nametoindex(scope) if scope else 0
