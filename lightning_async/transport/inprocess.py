"""The in-process channel: rank 0's own worker talks to its session without a thread or a copy in between."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.message import Message

__all__ = ["in_process_pair"]


class _End(Channel):
    def __init__(self, buffers: Buffers) -> None:
        super().__init__(buffers)
        self.peer: _End | None = None
        self.inbox: list[Message] = []
        self.on_message: Callable[[], None] | None = None

    def send(self, message: Message, payload: Tensor | None = None) -> None:
        if self.peer is None:
            raise ChannelClosedError("channel closed")
        # The payload is where the peer reads it: both ends have the same buffers.
        self.peer.inbox.append(message)
        # The session serves the request in the worker's thread: handing it to another one would cost two thread
        # switches, up to 5 ms each while this thread runs pure Python.
        if self.peer.on_message is not None:
            self.peer.on_message()

    def receive(self) -> Message:
        if not self.inbox:
            raise ChannelClosedError("channel closed")
        return self.inbox.pop(0)

    def receive_payload(self, out: Tensor) -> None:
        return

    def close(self) -> None:
        if self.peer is not None:
            self.peer.peer = None
            self.peer = None


def in_process_pair(buffers: Buffers) -> tuple[Channel, Channel, Callable[[Callable[[], None]], None]]:
    """Two ends of a channel within one thread.

    Args:
        buffers: the buffers of both ends.

    Returns:
        The worker's end, the session's end, and a function that takes what serves one request: it is called in the
        worker's thread for each message that the worker sends.
    """
    worker, session = _End(buffers), _End(buffers)
    worker.peer, session.peer = session, worker

    def serve_with(handler: Callable[[], None]) -> None:
        session.on_message = handler

    return worker, session, serve_with
