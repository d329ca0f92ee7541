"""Which of this machine's addresses others reach it at."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["address_towards", "outward_address"]

# Of Linux: the call that tells an interface's IPv4 address, and the scope of an IPv6 address that others can reach.
_SIOCGIFADDR = 0x8915
_GLOBAL = "00"


def outward_address() -> str:
    """The address that other machines most likely reach this one at; the loopback address where it has no other.

    That of the default route's interface. Machines that are linked to each other and to nothing else have no such
    route: then it is the first address of any interface.
    """
    for family, far in ((socket.AF_INET, "10.255.255.255"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Sends nothing: it only has the kernel choose the interface.
            probe.connect((far, 1))
            return str(probe.getsockname()[0])
    return next(_interface_addresses(), "127.0.0.1")


def address_towards(host: str) -> str:
    """This host's own address on the way to another host, which is where that one finds it.

    Args:
        host: name or address of the other one.

    Raises:
        OSError: if there is no way to it.
    """
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            # Sends nothing: it only has the kernel choose the interface.
            probe.connect(address)
            return str(probe.getsockname()[0])
    return outward_address()


def _interface_addresses() -> Iterator[str]:
    """The addresses of this host's interfaces but for the loopback one, those of IPv4 first; known on Linux only."""
    if sys.platform != "linux":
        return
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                address = socket.inet_ntoa(found[20:24])
                if not address.startswith("127."):
                    yield address
    with suppress(OSError):
        for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, *_ = line.split()
            if scope == _GLOBAL:
                yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
