"""What a channel is: one worker's ordered exchange of messages and payloads with the holder.

Implemented by `shm.py` (another process on the holder's host), `tcp.py` (any other process), `nccl.py` (GPU to GPU),
`inprocess.py` (rank 0's own worker), `staged.py` (around another one, for buffers on a GPU) and `fake.py` (tests).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_async.transport.message import Message

__all__ = ["Buffers", "Channel", "ChannelClosedError"]


class ChannelClosedError(ConnectionError):
    """The other side of a channel is gone."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """The two flat buffers of one side of a channel; over shared memory both sides have the same.

    Args:
        gradient: filled by the worker, read by the holder's session.
        parameters: filled by the holder's session, read by the worker.
    """

    gradient: Tensor
    parameters: Tensor

    @classmethod
    def allocate(cls, numel: int, dtype: torch.dtype, device: torch.device | None = None) -> Buffers:
        """Zeroed buffers in this process's own memory, or on ``device``."""
        return cls(torch.zeros(numel, dtype=dtype, device=device), torch.zeros(numel, dtype=dtype, device=device))


class Channel(ABC):
    """One side of an exchange in which every request is answered by one reply.

    A payload is a part of one of the channel's buffers and travels only behind its message: the receiver looks at the
    message first, refuses it if it does not fit, and only then takes the payload into the same part of its own buffer.

    Args:
        buffers: this side's buffers.

    Attributes:
        serves_any_thread: whether a payload takes a while, and another thread than the one that computes may wait for
            it. On a GPU it may not: a payload is ordered behind what its thread has queued there.
        wire_bytes: bytes of payloads that have gone over a network, in both directions.
    """

    serves_any_thread = False

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.wire_bytes = 0

    @abstractmethod
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        """Sends a message and the payload that it announces, a part of one of this side's buffers.

        Raises:
            ChannelClosedError: if the peer is gone.
        """

    @abstractmethod
    def receive(self) -> Message:
        """Waits for the next message, for as long as it takes.

        Raises:
            ChannelClosedError: if the peer is gone.
            WireError: if what arrives is not a message of this protocol.
        """

    @abstractmethod
    def receive_payload(self, out: Tensor) -> None:
        """Takes the payload that the last message announced into ``out``, the same part of this side's buffer.

        Raises:
            ChannelClosedError: if the peer is gone or does not deliver in time.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the exchange; idempotent. A peer that waits gets a ChannelClosedError."""
