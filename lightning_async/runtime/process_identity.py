"""Which process a rank is, so that one that was taken out of the run and is only stopped can be ended."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from typing import Any

from lightning_async.transport.shm import host_identity

__all__ = ["ProcessIdentity"]

log = logging.getLogger(__name__)

# In /proc/PID/stat, after the command's closing bracket.
_START_TIME = 19


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, told from any other that had, or will have, its number.

    Args:
        host: what its host and namespace are known by; empty where that is not known.
        pid: its number.
        started: when it was started, in ticks since its host was.

    Examples:
        >>> own = ProcessIdentity.of_this_process()
        >>> own.is_here() and ProcessIdentity.from_claims(own.as_claims()) == own
        True
    """

    host: str
    pid: int
    started: str

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        """This process."""
        return cls(host_identity(), os.getpid(), _started(os.getpid()))

    @classmethod
    def from_claims(cls, claims: dict[str, Any]) -> ProcessIdentity | None:
        """What `as_claims` told of; None if that is nothing of the kind."""
        host, pid, started = (claims.get(name) for name in ("host", "pid", "started"))
        if not isinstance(host, str) or not isinstance(pid, int) or not isinstance(started, str):
            return None
        return cls(host, pid, started)

    def as_claims(self) -> dict[str, Any]:
        """The process in JSON values, for a handshake."""
        return {"host": self.host, "pid": self.pid, "started": self.started}

    def is_here(self) -> bool:
        """Whether it runs, or is stopped, on this host."""
        return bool(self.host and self.started) and self.host == host_identity() and _started(self.pid) == self.started

    def kill(self) -> None:
        """Ends it at once, if it is on this host."""
        if self.is_here():
            try:
                os.kill(self.pid, signal.SIGKILL)
            except OSError as error:
                log.debug("process %d could not be ended: %s", self.pid, error)


def _started(pid: int) -> str:
    """When a process was started; empty if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[_START_TIME]
    except OSError:
        return ""
