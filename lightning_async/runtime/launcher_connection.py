"""A launcher's side of its connection to rank 0, and what goes over it; `launchers.py` is rank 0's side."""

from __future__ import annotations

import json
import logging
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from lightning_async.runtime.failure import describe_exit
from lightning_async.runtime.handshake import LAUNCHER, Address, handshake
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection

__all__ = ["BEAT_S", "ERROR", "LauncherConnection", "Lost", "receive_values", "say_on_host", "send_values"]

log = logging.getLogger(__name__)

BEAT_S = 2.0
# The status of a process that ends with an error of its own, which would come again.
ERROR = 1
_SIZE = struct.Struct("<I")
_MOST_BYTES = 1 << 16


class Lost(NamedTuple):
    """Rank 0's word on a rank that is out of the run.

    Attributes:
        rank: the rank.
        reason: what happened to it, as far as rank 0 knows.
        told: what becomes of it, in words.
        start: which start of it is wanted; 0 for none.
        delay_s: seconds to wait before that.
        leaves: whether it leaves by itself.
    """

    rank: int
    reason: str
    told: str
    start: int = 0
    delay_s: float = 0.0
    leaves: bool = False

    def describe_end(self, code: int | None) -> str:
        """What happened to it, as its host knows it, where rank 0 has seen no more than that it is gone.

        Args:
            code: exit status of its process; None if it has not ended.

        Examples:
            >>> Lost(3, "its process is gone: the connection was closed", "").describe_end(-9)
            'its process was killed by SIGKILL'
            >>> Lost(3, "gave no sign of life for 60 s (worker_timeout)", "").describe_end(-9)
            'gave no sign of life for 60 s (worker_timeout)'
        """
        return describe_exit(code) if code not in (None, 0, ERROR) and "connection" in self.reason else self.reason


class LauncherConnection:
    """A launcher's connection to rank 0.

    Args:
        address: where rank 0 listens.
        ranks: those that were started from here.
        host: which host this is, among those of the run.
        unable: why none of them can be started again, in words; empty if they can.
        patience_s: how many seconds to try; None for as long as the run waits for a sign of life.

    Raises:
        HandshakeError: if rank 0 refuses, with its reason.
        ChannelClosedError: if rank 0 cannot be reached.
    """

    def __init__(
        self,
        address: Address,
        ranks: Sequence[int],
        host: int,
        unable: str = "",
        patience_s: float | None = None,
    ) -> None:
        claims: dict[str, Any] = {"ranks": list(ranks), "host": host, "unable": unable}
        self._connection, _ = handshake(address, ranks[0], LAUNCHER, patience_s=patience_s, **claims)
        self._connection.survive_cuts(address.timeout_s)
        self._beaten_at = time.monotonic()
        self._closing = threading.Event()

    def fileno(self) -> int:
        """The socket's descriptor, for a selector."""
        return self._connection.fileno()

    def receive(self) -> Lost | None:
        """Rank 0's next word; None if the run has come to its end.

        Raises:
            ChannelClosedError: if rank 0 is gone, or the run has failed.
        """
        word = receive_values(self._connection)
        return Lost(*word) if word else None

    def beat(self) -> None:
        """Gives a sign of life, if one is due; without it, nobody would notice that the link is cut."""
        now = time.monotonic()
        if now - self._beaten_at >= BEAT_S:
            self._beaten_at = now
            self._say()

    def report(self, rank: int, code: int, start: int) -> None:
        """Tells how the process of a rank has ended.

        Args:
            rank: the rank.
            code: its exit status.
            start: which start of it that was.
        """
        self._say(rank, code, start)

    def _say(self, *values: int) -> None:
        try:
            send_values(self._connection, *values)
        except ChannelClosedError as error:
            # Noticed by the reading side.
            log.debug("rank 0 is gone: %s", error)

    def heed(self, act: Callable[[Lost], object]) -> None:
        """Does what rank 0 says until the run is over, or `close` is called; then the connection is closed.

        Args:
            act: called with each of rank 0's words.
        """
        try:
            while not self._closing.is_set():
                self.beat()
                waited_for: list[Any] = [self._connection]
                if wait(waited_for, timeout=BEAT_S):
                    if (word := self.receive()) is None:
                        return
                    act(word)
        except ChannelClosedError as error:
            log.debug("rank 0 is gone: %s", error)
        finally:
            self._connection.close()

    def stop(self) -> None:
        """Has `heed` return."""
        self._closing.set()
        self._connection.shutdown()

    def close(self) -> None:
        """Closes the connection; idempotent."""
        self._connection.close()


def say_on_host(host: int, text: str) -> None:
    """Prints one line of a launcher that is none of the ranks to stderr, in one write."""
    sys.stderr.write(f"[host {host}] lightning_async: {text}\n")
    sys.stderr.flush()


def send_values(connection: ControlConnection, *values: Any) -> None:
    """Says something that JSON can say.

    Raises:
        ChannelClosedError: if the other side is gone.
    """
    data = json.dumps(values).encode()
    connection.send_encoded(_SIZE.pack(len(data)) + data)


def receive_values(connection: ControlConnection) -> list[Any]:
    """Waits for what the other side says.

    Raises:
        ChannelClosedError: if it is gone, or says what it cannot mean.
    """
    head = bytearray(_SIZE.size)
    connection.receive_bytes(memoryview(head))
    (size,) = _SIZE.unpack(head)
    if size > _MOST_BYTES:
        raise ChannelClosedError(f"{size} bytes were announced, more than the {_MOST_BYTES} allowed")
    data = bytearray(size)
    connection.receive_bytes(memoryview(data))
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ChannelClosedError(f"what was said cannot be read: {error}") from error
    return values if isinstance(values, list) else []
