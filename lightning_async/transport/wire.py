"""How payloads lie on a network: as they are, or rounded to a smaller dtype. Tensors in, bytes out; no I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.transport.message import Message

__all__ = ["PIECE", "PLAIN", "PlainWire", "RoundedWire", "Wire", "as_bytes"]

# Values that are encoded, or decoded, while the ones before, or after, are on their way.
PIECE = 1 << 20


class Wire(ABC):
    """One direction of a channel; sender and receiver have one each, of the same kind.

    Attributes:
        needs_exact: whether the next payload must be told by `pass_exact`, since later ones build on it.
    """

    needs_exact = False

    @abstractmethod
    def size(self, payload: Tensor) -> int:
        """Bytes that a payload takes on the wire."""

    @abstractmethod
    def encode(self, payload: Tensor, message: Message) -> Iterator[Tensor]:
        """The bytes to send for a payload, in pieces; each is valid until the next is asked for.

        Args:
            payload: a part of one of the channel's flat buffers; it stays as it is.
            message: what announces it.
        """

    @abstractmethod
    def decode(self, out: Tensor) -> Iterator[Tensor]:
        """Where to receive each piece, in turn; it is decoded into ``out`` when the next is asked for.

        Args:
            out: the same part of this side's buffer.
        """

    def pass_exact(self, payload: Tensor) -> None:  # noqa: B027  # most kinds keep nothing
        """Notes a payload that was sent, or received, as it is."""


class PlainWire(Wire):
    """Payloads travel as they are."""

    @override
    def size(self, payload: Tensor) -> int:
        return payload.nbytes

    @override
    def encode(self, payload: Tensor, message: Message) -> Iterator[Tensor]:
        yield as_bytes(payload)

    @override
    def decode(self, out: Tensor) -> Iterator[Tensor]:
        yield as_bytes(out)


PLAIN = PlainWire()


class RoundedWire(Wire):
    """Payloads are rounded to a smaller floating-point dtype.

    Args:
        numel: size of the flat buffers.
        dtype: what they are rounded to.

    Examples:
        >>> wire, out = RoundedWire(2, torch.bfloat16), torch.zeros(2)
        >>> for sent, arrived in zip(wire.encode(torch.tensor([1.0, 1.001]), None), wire.decode(out), strict=True):
        ...     _ = arrived.copy_(sent)
        >>> out
        tensor([1., 1.])
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._staging = torch.empty(min(numel, PIECE), dtype=dtype)

    @override
    def size(self, payload: Tensor) -> int:
        return payload.numel() * self._staging.itemsize

    @override
    def encode(self, payload: Tensor, message: Message) -> Iterator[Tensor]:
        for part in _pieces(payload):
            if self._staging.dtype is torch.float16:
                # Its largest number is small enough that one large gradient would arrive as infinity and spoil the
                # state.
                largest = torch.finfo(torch.float16).max
                part = part.clamp(-largest, largest)
            yield as_bytes(self._staging[: part.numel()].copy_(part))

    @override
    def decode(self, out: Tensor) -> Iterator[Tensor]:
        for part in _pieces(out):
            arrived = self._staging[: part.numel()]
            yield as_bytes(arrived)
            part.copy_(arrived)


def as_bytes(values: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as bytes."""
    return values.view(torch.uint8)


def _pieces(values: Tensor) -> Iterator[Tensor]:
    for start in range(0, values.numel(), PIECE):
        yield values[start : start + PIECE]
