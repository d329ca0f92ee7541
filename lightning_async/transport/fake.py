"""The fake channel: two threads of one process, with faults to order. For tests and for trying out failures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.codec import HEADER_BYTES, decode, decode_header, encode
from lightning_async.transport.message import Message

__all__ = ["FakeChannel", "fake_pair"]

Fault = Callable[[Message], None]


class FakeChannel(Channel):
    """One end of a channel between threads; every message passes through its byte form.

    Args:
        buffers: this end's buffers.
        fault: called with each message before it is sent; raises to lose the connection at that point.
    """

    def __init__(self, buffers: Buffers, fault: Fault | None = None) -> None:
        super().__init__(buffers)
        self._inbox: queue.Queue[tuple[bytes, Tensor | None] | None] = queue.Queue()
        self._peer: FakeChannel | None = None
        self._fault = fault
        self._payload: Tensor | None = None
        self._closed = threading.Event()

    def join(self, peer: FakeChannel) -> None:
        """Makes ``peer`` the other end."""
        self._peer = peer

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        # The payload is copied, as a network would.
        if self._closed.is_set() or self._peer is None or self._peer._closed.is_set():
            raise ChannelClosedError("connection closed")
        if self._fault is not None:
            self._fault(message)
        self._peer._inbox.put((encode(message), None if payload is None else payload.clone()))

    @override
    def receive(self) -> Message:
        item = self._inbox.get()
        if item is None:
            self._inbox.put(None)
            raise ChannelClosedError("connection closed")
        data, self._payload = item
        header = decode_header(data[:HEADER_BYTES])
        return decode(data[:HEADER_BYTES], data[HEADER_BYTES : HEADER_BYTES + header.trailer_bytes])

    @override
    def receive_payload(self, out: Tensor) -> None:
        if self._payload is None:
            raise ChannelClosedError("the last message announced no payload")
        out.copy_(self._payload)
        self._payload = None

    @override
    def close(self) -> None:
        self._closed.set()
        self._inbox.put(None)
        if self._peer is not None:
            self._peer._inbox.put(None)


def fake_pair(
    numel: int, dtype: torch.dtype = torch.float32, worker_fault: Fault | None = None
) -> tuple[FakeChannel, FakeChannel]:
    """The worker's and the session's end of a channel between two threads.

    Args:
        numel: size of each buffer.
        dtype: of the buffers.
        worker_fault: called with each message that the worker sends; see `FakeChannel`.
    """
    worker = FakeChannel(Buffers.allocate(numel, dtype), worker_fault)
    session = FakeChannel(Buffers.allocate(numel, dtype))
    worker.join(session)
    session.join(worker)
    return worker, session
