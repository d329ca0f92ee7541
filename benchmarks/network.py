"""Hosts on a network of their own: network namespaces of this process, and a link that can be slow or cut.

A host is a thread that has left the machine's network for one of its own. What it calls, and threads and processes that
start there, see that host's interfaces only; a socket keeps the network that it was opened in. Nothing of it has a name
or outlives the process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["HostThread", "Link", "Network", "leave_other_processes"]

_T = TypeVar("_T")
_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x20000000, 0x40000000
_MS_REC_PRIVATE = 0x4000 | 0x40000
# What a router may keep of a link's traffic.
_QUEUE_MS = 100


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def leave_other_processes() -> None:
    """Lets the only thread of this process go on in a process that sees no other's, as on a host of its own.

    Ranks that see each other's processes take shared memory, whatever network they are on. It does not return in the
    process that calls it, which waits for the one that goes on, and ends as that does.
    """
    _check(_libc().unshare(_CLONE_NEWPID | _CLONE_NEWNS))
    if first := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    _check(_libc().mount(None, b"/", None, _MS_REC_PRIVATE, None))
    _check(_libc().mount(b"proc", b"/proc", b"proc", 0, None))


class HostThread:
    """A host: ``run`` calls something there and returns its result."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "host")
        self.tid = self.run(self._leave)
        self._pid = os.getpid()

    def _leave(self) -> int:
        _check(_libc().unshare(_CLONE_NEWNET))
        return threading.get_native_id()

    def run(self, call: Callable[[], _T]) -> _T:
        return self._thread.submit(call).result()

    def enter(self) -> None:
        """Makes a fork, whose only thread calls this, a process of this host, which sees no other's processes.

        As with `leave_other_processes`, it does not return in the process that calls it.
        """
        with open(f"/proc/{self._pid}/task/{self.tid}/ns/net") as network:
            _check(_libc().setns(network.fileno(), _CLONE_NEWNET))
        leave_other_processes()

    def ip(self, *arguments: str) -> None:
        """Runs ``ip`` or ``tc`` there; the first argument says which."""
        self.run(lambda: subprocess.run(arguments, check=True, capture_output=True, text=True))

    def start(self, arguments: list[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a process there."""
        return self.run(lambda: subprocess.Popen(arguments, text=True, **options))

    def close(self) -> None:
        self._thread.shutdown()


class Network:
    """Hosts and a switch between them; the first has the addresses ``10.77.0.1`` and ``fd77::1``, and so on.

    Args:
        hosts: their number.
        v4: whether they have addresses of IPv4.
    """

    ADDRESS = "10.77.0.1"

    def __init__(self, hosts: int, v4: bool = True) -> None:
        self.hosts, self._switch = [HostThread() for _ in range(hosts)], HostThread()
        self._switch.ip("ip", "link", "add", "br0", "type", "bridge")
        self._switch.ip("ip", "link", "set", "br0", "up")
        for number, host in enumerate(self.hosts, 1):
            port = f"port-{chr(ord('a') + number - 1)}"
            peer = ["peer", "name", "eth0", "netns", str(host.tid)]
            self._switch.ip("ip", "link", "add", port, "type", "veth", *peer)
            self._switch.ip("ip", "link", "set", port, "master", "br0", "up")
            host.ip("ip", "link", "set", "lo", "up")
            host.ip("ip", "link", "set", "eth0", "up")
            if v4:
                host.ip("ip", "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            host.ip("ip", "addr", "add", f"fd77::{number}/64", "dev", "eth0", "nodad")

    def limit(self, megabits: float) -> None:
        """Gives each host's way out a rate, with a queue as a router has it."""
        for host in self.hosts:
            rate = ["rate", f"{megabits}mbit", "burst", "32k", "latency", f"{_QUEUE_MS}ms"]
            host.ip("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *rate)

    def carried_bytes(self, host: int = 0) -> tuple[int, int]:
        """Bytes that a host has sent and received."""
        table = self.hosts[host].run(lambda: Path(f"/proc/{threading.get_native_id()}/net/dev").read_text())
        (line,) = (line for line in table.splitlines() if line.strip().startswith("eth0:"))
        fields = line.split(":")[1].split()
        return int(fields[8]), int(fields[0])

    def close(self) -> None:
        """Ends the hosts."""
        for host in (*self.hosts, self._switch):
            host.close()


class Link(Network):
    """Two hosts, ``a`` and ``b``, whose link can be cut."""

    def __init__(self, v4: bool = True) -> None:
        super().__init__(2, v4)
        self.a, self.b = self.hosts

    def cut(self, host: str = "b") -> None:
        """Lets nothing through, and no side is told: the switch has lost ``host``."""
        self._switch.ip("ip", "link", "set", f"port-{host}", "nomaster")

    def mend(self, host: str = "b") -> None:
        """Ends `cut`."""
        self._switch.ip("ip", "link", "set", f"port-{host}", "master", "br0")

    def unplug(self) -> None:
        """Takes b's interface down, which its own kernel sees."""
        self.b.ip("ip", "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Ends `unplug`."""
        self.b.ip("ip", "link", "set", "eth0", "up")
