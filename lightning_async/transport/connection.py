"""The control connection: messages over one socket, TCP or Unix. Idle waiting happens here.

A socket reports the death of its peer within milliseconds, even in the middle of a message, which a Gloo receive does
not; so a thread that waits without a payload under way waits here.
"""

from __future__ import annotations

import os
import select
import socket
import time

from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.codec import HEADER_BYTES, assemble, decode_header, encode, read_message
from lightning_async.transport.message import Message

__all__ = ["ControlConnection", "connect"]


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
    def local_host(self) -> str:
        """The address of this side, which the other side has just shown it can reach."""
        return str(self._socket.getsockname()[0])

    @property
    def peer(self) -> str:
        """``host:port`` of the other side, or "unknown" once it is gone."""
        try:
            host, port = self._socket.getpeername()[:2]
        except OSError:
            return "unknown"
        return f"{host}:{port}"

    def settimeout(self, timeout_s: float | None) -> None:
        """Limits each wait to ``timeout_s`` seconds; None waits for ever."""
        self._socket.settimeout(timeout_s)

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

    def send_bytes(self, data: memoryview) -> None:
        """Sends bytes that a message has announced.

        Raises:
            ChannelClosedError: if the peer is gone or a time-out is set and runs out.
        """
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosedError(f"connection lost while sending: {error}") from error

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

    def receive_available(self) -> list[Message]:
        """The messages that have arrived whole, without waiting; for use with a selector that says "readable".

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


def connect(host: str, port: int, timeout_s: float) -> ControlConnection:
    """Connects to the holder.

    Raises:
        ChannelClosedError: if nobody answers within ``timeout_s`` seconds.
    """
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise ChannelClosedError(f"no holder answers at {host}:{port}: {error}") from error
    sock.settimeout(None)
    return ControlConnection(sock)
