"""The in-process channel: rank 0's own worker talks to its session without a thread or a copy in between."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.wire import Message

__all__ = ["in_process_pair"]


class _End(Channel):
    def __init__(self) -> None:
        self.peer: _End | None = None
        self.inbox: list[tuple[Message, Tensor | None]] = []
        self.payload: Tensor | None = None
        self.on_message: Callable[[], None] | None = None

    def send(self, message: Message, payload: Tensor | None = None) -> None:
        if self.peer is None:
            raise ChannelClosedError("channel closed")
        self.peer.inbox.append((message, payload))
        # The session serves the request in the worker's thread: handing it to another one would cost two thread
        # switches, up to 5 ms each while this thread runs pure Python.
        if self.peer.on_message is not None:
            self.peer.on_message()

    def receive(self) -> Message:
        if not self.inbox:
            raise ChannelClosedError("channel closed")
        message, self.payload = self.inbox.pop(0)
        return message

    def receive_payload(self, out: Tensor) -> None:
        if self.payload is None:
            raise ChannelClosedError("the last message announced no payload")
        out.copy_(self.payload)
        self.payload = None

    def close(self) -> None:
        if self.peer is not None:
            self.peer.peer = None
            self.peer = None


def in_process_pair() -> tuple[Channel, Channel, Callable[[Callable[[], None]], None]]:
    """Two ends of a channel within one thread.

    Returns:
        The worker's end, the session's end, and a function that takes what serves one request: it is called in the
        worker's thread for each message that the worker sends.
    """
    worker, session = _End(), _End()
    worker.peer, session.peer = session, worker

    def serve_with(handler: Callable[[], None]) -> None:
        session.on_message = handler

    return worker, session, serve_with
