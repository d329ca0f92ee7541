"""The shortcut: a Unix socket that a control channel moves to where both sides are on one host and share memory.

A message over TCP's loopback passes through the whole network stack: for a small model that is a tenth of an update.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import time

from lightning_async.transport.base import ChannelClosedError

__all__ = ["Shortcut", "find_shortcut"]

log = logging.getLogger(__name__)

_ARRIVAL_TIMEOUT_S = 10.0
# Linux: pid, uid and gid of the other side, as they were when it connected.
_CREDENTIALS = struct.Struct("iII")


class Shortcut:
    """Rank 0's side, for one worker; its name is in no file system, so that nothing is left over.

    A name can be found by any process of the host, so who comes is asked for its user: another process of this user
    could read the memory of both sides anyway.

    Raises:
        OSError: if there are no such sockets here.
    """

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The null byte in front makes it Linux's abstract name, which ends with the socket.
        self.name = f"lightning_async-{secrets.token_hex(16)}"
        try:
            self._listener.bind(f"\0{self.name}")
            self._listener.listen()
        except OSError:
            self._listener.close()
            raise

    def take(self) -> socket.socket:
        """This side, connected to the worker, which has come already.

        Raises:
            ChannelClosedError: if it has not.
        """
        deadline = time.monotonic() + _ARRIVAL_TIMEOUT_S
        while True:
            self._listener.settimeout(max(1e-3, deadline - time.monotonic()))
            try:
                arrived, _ = self._listener.accept()
            except OSError as error:
                raise ChannelClosedError(f"the worker has not come to the shortcut: {error}") from error
            if _user_of(arrived) == os.getuid():
                return arrived
            log.warning("lightning_async: a process of another user came to %s and was sent away", self.name)
            arrived.close()

    def close(self) -> None:
        """Lets nobody in any more."""
        self._listener.close()


def find_shortcut(name: str) -> socket.socket | None:
    """A worker's side, connected; None if rank 0 cannot be reached this way."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"\0{name}")
    except OSError as error:
        # Two containers may share memory and not a network.
        log.debug("no shortcut to rank 0: %s", error)
        sock.close()
        return None
    return sock


def _user_of(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])
