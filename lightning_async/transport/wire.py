"""How payloads lie on a network: as they are, or rounded to a smaller dtype. Tensors in, bytes out; no I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.transport.message import Message

__all__ = ["PLAIN", "PlainWire", "RoundedWire", "Wire", "as_bytes"]


class Wire(ABC):
    """One direction of a channel; sender and receiver have one each, of the same kind.

    Attributes:
        needs_exact: whether the next payload must be told by `pass_exact`, since later ones build on it.
    """

    needs_exact = False

    @abstractmethod
    def encode(self, payload: Tensor, message: Message) -> Tensor:
        """The bytes to send for a payload; valid until the next call.

        Args:
            payload: a part of one of the channel's flat buffers; it stays as it is.
            message: what announces it.
        """

    @abstractmethod
    def room_for(self, out: Tensor) -> Tensor:
        """Where the bytes of the payload that belongs into ``out`` are received; valid until the next call."""

    @abstractmethod
    def decode(self, arrived: Tensor, out: Tensor) -> None:
        """Makes the payload of received bytes.

        Args:
            arrived: from `room_for`, filled.
            out: the same part of this side's buffer.
        """

    def pass_exact(self, payload: Tensor) -> None:  # noqa: B027  # most kinds keep nothing
        """Notes a payload that was sent, or received, as it is."""


class PlainWire(Wire):
    """Payloads travel as they are."""

    @override
    def encode(self, payload: Tensor, message: Message) -> Tensor:
        return as_bytes(payload)

    @override
    def room_for(self, out: Tensor) -> Tensor:
        return as_bytes(out)

    @override
    def decode(self, arrived: Tensor, out: Tensor) -> None:
        return


PLAIN = PlainWire()


class RoundedWire(Wire):
    """Payloads are rounded to a smaller floating-point dtype.

    Args:
        numel: size of the flat buffers.
        dtype: what they are rounded to.

    Examples:
        >>> wire = RoundedWire(2, torch.bfloat16)
        >>> out = torch.zeros(2)
        >>> arrived = wire.room_for(out).copy_(wire.encode(torch.tensor([1.0, 1.001]), None))
        >>> wire.decode(arrived, out)
        >>> out
        tensor([1., 1.])
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._staging = torch.empty(numel, dtype=dtype)

    @override
    def encode(self, payload: Tensor, message: Message) -> Tensor:
        staging = self._staging[: payload.numel()]
        if staging.dtype is torch.float16:
            # Its largest number is small enough that one large gradient would arrive as infinity and spoil the state.
            largest = torch.finfo(torch.float16).max
            payload = payload.clamp(-largest, largest)
        return as_bytes(staging.copy_(payload))

    @override
    def room_for(self, out: Tensor) -> Tensor:
        return as_bytes(self._staging[: out.numel()])

    @override
    def decode(self, arrived: Tensor, out: Tensor) -> None:
        out.copy_(self._staging[: out.numel()])


def as_bytes(values: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as bytes."""
    return values.view(torch.uint8)
