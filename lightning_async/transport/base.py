"""What a channel is: one worker's ordered exchange of messages and payloads with the holder.

Implemented by `gloo.py` (another process), `inprocess.py` (rank 0's own worker) and `fake.py` (tests); shared memory
and NCCL belong here too. Used by `worker.py` and `server.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_async.wire import Message

__all__ = ["Channel", "ChannelClosedError"]


class ChannelClosedError(ConnectionError):
    """The other side of a channel is gone."""


class Channel(ABC):
    """One side of an exchange in which every request is answered by one reply.

    A payload travels only behind its message: the receiver looks at the message first, refuses it if it does not fit,
    and only then takes the payload into a buffer of the right size.
    """

    @abstractmethod
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        """Sends a message and the payload that it announces.

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
        """Takes the payload that the last message announced into ``out``, which must be of its size and dtype.

        Raises:
            ChannelClosedError: if the peer is gone or does not deliver in time.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the exchange; idempotent. A peer that waits gets a ChannelClosedError."""
