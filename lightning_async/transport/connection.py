"""The control connection: messages over one socket, TCP or Unix, and between hosts the payloads behind them.

A socket reports the death of its peer within milliseconds, even in the middle of a payload.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.codec import (
    HEADER_BYTES,
    MAX_TRAILER_BYTES,
    assemble,
    decode_header,
    encode,
    read_message,
)
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Message

__all__ = ["ControlConnection", "connect", "join_host_port"]

# Linux 6.15 and later; this Python has no name for it.
_TCP_RTO_MAX_MS = 44
# Between two tries to send what was not acknowledged; the kernel doubles them up to two minutes otherwise, and a
# connection would be silent for as long again as a cut of its link has lasted.
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 1.0, 5.0
# The system's own end of a connection comes after ours.
_KERNEL_PATIENCE_S = 10.0
_LOW_DELAY, _INTERACTIVE = 0x10, 6
# A payload is passed in pieces, so that a standstill is seen and Python's lock is seldom taken.
_PIECE_BYTES = 1 << 20
_LONGEST_TICK_S = 1.0


class ControlConnection:
    """A connected socket that carries whole messages.

    Args:
        sock: a connected stream socket; owned from here on.
    """

    def __init__(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            # Messages are small and each is waited for: without this, Nagle's algorithm holds them back.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        # What `receive_available` has read of a message that is not complete yet.
        self._partial = b""

    def fileno(self) -> int:
        """The socket's descriptor, for a selector."""
        return self._socket.fileno()

    @property
    def peer(self) -> str:
        """``host:port`` of the other side, or "unknown" once it is gone."""
        try:
            host, port = self._socket.getpeername()[:2]
        except OSError:
            return "unknown"
        return join_host_port(host, port)

    def settimeout(self, timeout_s: float | None) -> None:
        """Limits each wait to ``timeout_s`` seconds; None waits for ever."""
        self._socket.settimeout(timeout_s)

    def survive_cuts(self, timeout_s: float) -> None:
        """Has the system keep the connection through a cut of its link that is shorter than ``timeout_s``.

        Without it the connection might be given up earlier, or be silent for long after the cut.
        """
        if self._socket.family == socket.AF_UNIX:
            return
        retry_s = min(max(timeout_s / 15, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)
        patience_ms = int(1000 * (timeout_s + _KERNEL_PATIENCE_S))
        for option, value in (
            (getattr(socket, "TCP_USER_TIMEOUT", 18), patience_ms),
            (_TCP_RTO_MAX_MS, retry_s * 1000),
        ):
            # An older kernel, or another one than Linux, goes on as it does.
            with suppress(OSError, OverflowError):
                self._socket.setsockopt(socket.IPPROTO_TCP, option, int(value))

    def go_first(self) -> None:
        """Has the system send what is said here before what waits on other connections of this host."""
        v6 = self._socket.family == socket.AF_INET6
        header = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if v6 else (socket.IPPROTO_IP, socket.IP_TOS)
        # Of Linux: in its queues, and in the packets' headers, which routers may heed.
        for level, option, value in (
            (*header, _LOW_DELAY),
            (socket.SOL_SOCKET, getattr(socket, "SO_PRIORITY", 12), _INTERACTIVE),
        ):
            with suppress(OSError):
                self._socket.setsockopt(level, option, value)

    def move_to(self, sock: socket.socket) -> None:
        """Goes on over another connected socket to the same peer; nothing may be under way.

        Args:
            sock: owned from here on; the time-out moves, too.
        """
        sock.settimeout(self._socket.gettimeout())
        before, self._socket = self._socket, sock
        before.close()

    def send(self, message: Message) -> None:
        """Sends one message.

        Raises:
            ChannelClosedError: if the peer is gone or a time-out is set and runs out.
        """
        self.send_encoded(encode(message))

    def send_encoded(self, data: bytes) -> None:
        """Sends a message that `encode` has made before.

        Raises:
            ChannelClosedError: as `send` does.
        """
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosedError(f"connection lost while sending: {error}") from error

    def receive(self, spin_s: float = 0.0) -> Message:
        """Waits for one message.

        Args:
            spin_s: how long to ask again and again before going to sleep, for an answer that is due at once: to wake
                a sleeping process takes longer than a small model's update.

        Raises:
            ChannelClosedError: if the peer is gone or a time-out is set and runs out.
            WireError: if the bytes are not a message of this protocol.
        """
        if spin_s:
            self._spin(spin_s)
        return read_message(self._receive_exactly)

    def receive_bytes(self, into: memoryview) -> None:
        """Fills ``into`` with bytes that a message has announced.

        Raises:
            ChannelClosedError: if the peer is gone or a time-out is set and runs out.
        """
        received = 0
        while received < len(into):
            try:
                count = self._socket.recv_into(into[received:])
            except OSError as error:
                raise ChannelClosedError(f"connection lost while receiving: {error}") from error
            if count == 0:
                raise ChannelClosedError("connection closed")
            received += count

    def send_payload(
        self,
        message: Message | None,
        payload: memoryview,
        stall_s: float,
        moved: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Sends a message and the payload that it announces; takes as long as bytes move.

        Args:
            message: None if it was sent before.
            payload: bytes.
            stall_s: seconds without a byte moved after which the peer is lost.
            moved: told of bytes as they move.

        Raises:
            ChannelClosedError: if the peer is gone, or lost.
        """
        head = memoryview(b"" if message is None else encode(message))
        with self._pieces(socket.SO_SNDTIMEO, stall_s) as clock:
            sent = 0
            while sent < len(head) + len(payload):
                start = max(0, sent - len(head))
                try:
                    count = self._socket.sendmsg((head[sent:], payload[start : start + _PIECE_BYTES]))
                except BlockingIOError:
                    clock.tick()
                except OSError as error:
                    raise ChannelClosedError(f"connection lost while sending: {error}") from error
                else:
                    sent += count
                    clock.moved()
                    moved(count)

    def receive_payload(
        self, into: memoryview, stall_s: float, moved: Callable[[int], None] = lambda count: None
    ) -> None:
        """Fills ``into`` with the payload that a message has announced; takes as long as bytes move.

        Args:
            into: bytes.
            stall_s: seconds without a byte moved after which the peer is lost.
            moved: told of bytes as they move.

        Raises:
            ChannelClosedError: if the peer is gone, or lost.
        """
        with self._pieces(socket.SO_RCVTIMEO, stall_s) as clock:
            received = 0
            while received < len(into):
                piece = into[received : received + _PIECE_BYTES]
                try:
                    count = self._socket.recv_into(piece, 0, socket.MSG_WAITALL)
                except BlockingIOError:
                    clock.tick()
                    continue
                except OSError as error:
                    raise ChannelClosedError(f"connection lost while receiving: {error}") from error
                if count == 0:
                    raise ChannelClosedError("connection closed")
                received += count
                clock.moved()
                moved(count)

    @contextmanager
    def _pieces(self, option: int, stall_s: float) -> Iterator[_StallClock]:
        """Bounds each of the system's own waits, so that a standstill is noticed."""
        tick_s = min(stall_s / 4, _LONGEST_TICK_S)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, option, _timeval(tick_s))
            yield _StallClock(stall_s, tick_s)
            self._socket.setsockopt(socket.SOL_SOCKET, option, _timeval(0.0))
        except OSError as error:
            if isinstance(error, ChannelClosedError):
                raise
            raise ChannelClosedError(f"connection lost: {error}") from error

    def receive_available(self, limit_bytes: int = HEADER_BYTES + MAX_TRAILER_BYTES) -> list[Message]:
        """The messages that have arrived whole, without waiting; for use with a selector that says "readable".

        Args:
            limit_bytes: a message that is longer is refused before it is kept.

        Raises:
            ChannelClosedError: if the peer has closed.
            WireError: if the bytes are not messages of this protocol.
        """
        try:
            data = self._socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosedError(f"connection lost while receiving: {error}") from error
        if not data:
            raise ChannelClosedError("connection closed")
        data = self._partial + data
        messages, start = [], 0
        while len(data) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            header = decode_header(data[start:body])
            end = body + header.trailer_bytes
            if end - start > limit_bytes:
                raise WireError(
                    f"it sends {header.kind.name} of {end - start} bytes, more than the {limit_bytes} allowed"
                )
            if len(data) < end:
                break
            messages.append(assemble(header, data[body:end]))
            start = end
        self._partial = data[start:]
        return messages

    def peer_has_left(self) -> bool:
        """Whether the peer has closed its side, even if something that it sent before is still unread."""
        # Linux alone tells a half-closed connection from one with something to read.
        return self._poll(getattr(select, "POLLRDHUP", 0))

    def is_readable(self) -> bool:
        """Whether `receive` would find something: the beginning of a message, or the end of the connection."""
        return self._poll(select.POLLIN)

    def _poll(self, events: int) -> bool:
        poll = select.poll()
        try:
            poll.register(self._socket, events)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            # Closed from here.
            return True

    def shutdown(self) -> None:
        """Wakes a thread that waits in `receive`, which then raises; the socket stays owned."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Already disconnected: then nobody is left waiting, which is all this is for.
            return

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def _spin(self, spin_s: float) -> None:
        deadline = time.perf_counter() + spin_s
        while time.perf_counter() < deadline:
            try:
                self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:  # noqa: PERF203  # it is what "not yet" looks like
                # Other threads that have something to do on this core go first.
                os.sched_yield()
            except OSError:
                # The receive that follows finds the same, and says so.
                return
            else:
                return

    def _receive_exactly(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.receive_bytes(memoryview(buffer))
        return bytes(buffer)


class _StallClock:
    """Sees that nothing has moved for too long.

    It adds up the waits and does not look at the time: a process that was stopped must not take its own silence for
    the peer's.

    Args:
        stall_s: how long that is.
        tick_s: how long one wait lasts.
    """

    def __init__(self, stall_s: float, tick_s: float) -> None:
        self._stall_s = stall_s
        self._tick_s = tick_s
        self._waited_s = 0.0

    def moved(self) -> None:
        """Notes that a byte has moved."""
        self._waited_s = 0.0

    def tick(self) -> None:
        """Notes that a wait has ended without a byte.

        Raises:
            ChannelClosedError: if that was one too many.
        """
        self._waited_s += self._tick_s
        if self._waited_s >= self._stall_s:
            raise ChannelClosedError(f"no byte of a payload has moved for {self._stall_s:g} s (worker_timeout)")


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, int((seconds - whole) * 1e6))


def join_host_port(host: str, port: int) -> str:
    """A host's name or address and a port, as they are written.

    Examples:
        >>> join_host_port("node1", 29500), join_host_port("fd77::1", 29500)
        ('node1:29500', '[fd77::1]:29500')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(host: str, port: int, timeout_s: float) -> ControlConnection:
    """Connects to the holder.

    Raises:
        ChannelClosedError: if nobody answers within ``timeout_s`` seconds.
    """
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise ChannelClosedError(f"no holder answers at {join_host_port(host, port)}: {error}") from error
    sock.settimeout(None)
    return ControlConnection(sock)
