"""A channel for buffers on a GPU around one whose buffers are in host memory: one copy each way per message.

For ranks that share a GPU, for a holder and a worker of which only one has a GPU, and wherever NCCL cannot be had.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.message import Message
from lightning_async.transport.pinning import pin, unpin
from lightning_async.transport.side_stream import SideStream, side_stream

__all__ = ["StagedChannel", "on_device"]


class StagedChannel(Channel):
    """A channel whose buffers are on ``device``, and travel through the pinned buffers of another channel.

    A payload is copied on a stream of its own: to the host behind what its thread has computed, and back before what
    its thread computes next, while the device's other work goes on.

    Args:
        inner: one side of a channel with host buffers; owned from here on.
        device: where this side computes.
        stream: makes the copies; a stream of its own on ``device`` by default.
    """

    def __init__(self, inner: Channel, device: torch.device, stream: SideStream | None = None) -> None:
        host = inner.buffers
        super().__init__(Buffers.allocate(host.gradient.numel(), host.gradient.dtype, device))
        self._inner = inner
        self._stream = stream or side_stream(device)
        self._places = ((self.buffers.gradient, host.gradient), (self.buffers.parameters, host.parameters))
        self._lock = threading.Lock()
        self._pinned = [tensor for tensor in (host.gradient, host.parameters) if pin(tensor)]

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        staged = None
        if payload is not None:
            staged = self._staging(payload)
            self._stream.copy(staged, payload)
        # Also without a payload: the peer may answer by writing where the last installation still reads from.
        self._stream.synchronize()
        self._inner.send(message, staged)
        self.wire_bytes = self._inner.wire_bytes

    @override
    def receive(self) -> Message:
        return self._inner.receive()

    @override
    def receive_payload(self, out: Tensor) -> None:
        # What its thread queues on the device from here on finds it there.
        staged = self._staging(out)
        self._inner.receive_payload(staged)
        self.wire_bytes = self._inner.wire_bytes
        self._stream.copy(out, staged)
        self._stream.join()

    @override
    def close(self) -> None:
        self._inner.close()
        with self._lock:
            pinned, self._pinned = self._pinned, []
        if pinned:
            self._stream.synchronize()
        for tensor in pinned:
            unpin(tensor)

    def _staging(self, payload: Tensor) -> Tensor:
        """The part of a host buffer that corresponds to a part of a device buffer."""
        for buffer, host in self._places:
            offset = (payload.data_ptr() - buffer.data_ptr()) // buffer.itemsize
            if offset >= 0 and offset + payload.numel() <= buffer.numel():
                return host[offset : offset + payload.numel()]
        raise ValueError("a payload must be a part of one of the channel's buffers")


def on_device(channel: Channel, device: torch.device) -> Channel:
    """The channel itself if its buffers are on ``device``; one with staging around it otherwise."""
    return channel if channel.buffers.gradient.device == device else StagedChannel(channel, device)
