"""Payloads of a byte for each value: int8 with a scale for each block, and what rounding loses sent later.

A block of 256 values has one fp32 scale, its largest magnitude over 127: 1.016 bytes a value.

- A *gradient* is sent with what rounding has lost of the ones before it (error feedback), which its sender keeps. So
  the sum of what arrives is that of what was sent, but for the last loss.
- *Parameters* are sent as the difference to what the receiver has. Both sides add the same rounded difference to the
  same copy, so errors do not add up: the next difference has the last one's error in it.

All of it is elementwise, in the flat buffers' dtype, so it is the same on every machine and with any number of threads.
A block in which a value is not finite arrives as NaN, and is left out of what is sent later. Of a gradient that will be
rejected nothing is sent later, and nothing that was lost before goes with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.transport.fields import unpack_bitmap
from lightning_async.transport.message import Message, Push
from lightning_async.transport.wire import PIECE, Wire

__all__ = ["BLOCK", "GradientWire", "ParameterWire", "dequantize", "quantize", "wire_bytes"]

BLOCK = 256
_LEVELS = 127
# So many values at once stay in a core's cache; a multiple of the block.
_CHUNK = 1 << 16
_SCALE_BYTES = 4
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_LARGEST_SCALE = torch.finfo(torch.float32).max / _LEVELS * (1 - 2**-22)


def wire_bytes(numel: int) -> int:
    """Bytes that ``numel`` values take on the wire.

    Examples:
        >>> wire_bytes(256), wire_bytes(257)
        (260, 265)
    """
    return numel + _SCALE_BYTES * -(-numel // BLOCK)


def quantize(values: Tensor, scales: Tensor, codes: Tensor) -> None:
    """Rounds values to codes, block by block.

    Args:
        values: one-dimensional; what the codes do not say is left in it: 0 for values that are not finite.
        scales: fp32, one for each block; filled.
        codes: int8, one for each value; filled.

    Examples:
        >>> values, scales, codes = torch.tensor([1.27, 0.5, 0.004]), torch.empty(1), torch.empty(3, dtype=torch.int8)
        >>> quantize(values, scales, codes)
        >>> codes.tolist(), round(scales.item(), 4), round(values[2].item(), 4)
        ([127, 50, 0], 0.01, 0.004)
    """
    full = values.numel() // BLOCK * BLOCK
    if full:
        _quantize_blocks(values[:full].view(-1, BLOCK), scales[: full // BLOCK, None], codes[:full].view(-1, BLOCK))
    if full < values.numel():
        _quantize_blocks(values[None, full:], scales[full // BLOCK :, None], codes[None, full:])


def dequantize(scales: Tensor, codes: Tensor, out: Tensor) -> None:
    """The values that codes stand for.

    Args:
        scales: from `quantize`.
        codes: from `quantize`.
        out: one-dimensional; filled.
    """
    full = codes.numel() // BLOCK * BLOCK
    if full:
        torch.mul(codes[:full].view(-1, BLOCK), scales[: full // BLOCK, None], out=out[:full].view(-1, BLOCK))
    if full < codes.numel():
        torch.mul(codes[full:], scales[full // BLOCK :], out=out[full:])


class _Staging:
    """Room for a piece: of each chunk the scales, then the codes."""

    def __init__(self, numel: int) -> None:
        self._bytes = torch.empty(wire_bytes(min(numel, PIECE)), dtype=torch.uint8)

    def pieces(self, numel: int) -> Iterator[tuple[Tensor, list[_Chunk]]]:
        """The bytes of each piece of a payload, and the chunks in it."""
        for start in range(0, numel, PIECE):
            end = min(start + PIECE, numel)
            chunks, at = [], 0
            for begin in range(start, end, _CHUNK):
                size = min(_CHUNK, end - begin)
                codes_at = at + _SCALE_BYTES * -(-size // BLOCK)
                scales = self._bytes[at:codes_at].view(torch.float32)
                at = codes_at + size
                chunks.append(_Chunk(begin, begin + size, scales, self._bytes[codes_at:at].view(torch.int8)))
            yield self._bytes[:at], chunks


class _Chunk(NamedTuple):
    begin: int
    end: int
    scales: Tensor
    codes: Tensor


class GradientWire(Wire):
    """Gradients, with error feedback at the sender.

    Args:
        numel: size of the flat buffers.
        dtype: of the flat buffers.
        sizes: for each optimizer the sizes of its parameters, in their order, at the sender.

    Attributes:
        lost: what was lost so far; sent with the next gradients.
    """

    def __init__(self, numel: int, dtype: torch.dtype, sizes: Sequence[Sequence[int]] = ()) -> None:
        self._staging = _Staging(numel)
        self._sizes = sizes
        self._starts = [0, *itertools.accumulate(map(sum, sizes))]
        self.lost = torch.zeros(numel if sizes else 0, dtype=dtype)

    @override
    def size(self, payload: Tensor) -> int:
        return wire_bytes(payload.numel())

    @override
    def encode(self, payload: Tensor, message: Message) -> Iterator[Tensor]:
        if isinstance(message, Push) and not message.finite:
            yield from self._encode_rejected(payload)
            return
        optimizer = message.optimizer if isinstance(message, Push) else 0
        start = self._starts[optimizer]
        lost = self.lost[start : start + payload.numel()]
        absent = self._absent(message, optimizer)
        # A parameter without a gradient has nothing to send now; what it has lost waits.
        waiting = [lost[span].clone() for span in absent]
        if absent:
            payload = payload.clone()
        for span in absent:
            payload[span] = lost[span] = 0.0
        for data, chunks in self._staging.pieces(payload.numel()):
            for begin, end, scales, codes in chunks:
                values = torch.add(payload[begin:end], lost[begin:end], out=lost[begin:end])
                quantize(values, scales, codes)
            yield data
        for span, kept in zip(absent, waiting, strict=True):
            lost[span] = kept

    @override
    def decode(self, out: Tensor) -> Iterator[Tensor]:
        for data, chunks in self._staging.pieces(out.numel()):
            yield data
            for begin, end, scales, codes in chunks:
                dequantize(scales, codes, out[begin:end])

    def _encode_rejected(self, payload: Tensor) -> Iterator[Tensor]:
        """A gradient that will be rejected, NaN where it is not finite: what was lost is not to go with it.

        Nor is what it loses itself to come with a later one: where some of it is infinite, the rest may be huge.
        """
        for data, chunks in self._staging.pieces(payload.numel()):
            for begin, end, scales, codes in chunks:
                quantize(payload[begin:end].clone(), scales, codes)
            yield data

    def _absent(self, message: Message, optimizer: int) -> list[slice]:
        if not isinstance(message, Push) or not message.present:
            return []
        sizes = self._sizes[optimizer]
        present = unpack_bitmap(message.present, len(sizes))
        if all(present):
            return []
        ends = list(itertools.accumulate(sizes))
        return [slice(end - size, end) for size, end, there in zip(sizes, ends, present, strict=True) if not there]


class ParameterWire(Wire):
    """Parameters, as differences to what the receiver has; the first ones are sent as they are.

    Args:
        numel: size of the flat buffers.
        dtype: of the flat buffers.

    Attributes:
        shown: what the receiver has; both sides keep it.
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._staging = _Staging(numel)
        self._scratch = torch.empty(min(numel, _CHUNK), dtype=dtype)
        self.shown = torch.empty(numel, dtype=dtype)
        self.needs_exact = True

    @override
    def size(self, payload: Tensor) -> int:
        return wire_bytes(payload.numel())

    @override
    def pass_exact(self, payload: Tensor) -> None:
        self.shown.copy_(payload)
        self.needs_exact = False

    @override
    def encode(self, payload: Tensor, message: Message) -> Iterator[Tensor]:
        for data, chunks in self._staging.pieces(payload.numel()):
            for begin, end, scales, codes in chunks:
                difference = torch.sub(payload[begin:end], self.shown[begin:end], out=self._scratch[: end - begin])
                quantize(difference, scales, codes)
                self._add(scales, codes, self.shown[begin:end])
            yield data

    @override
    def decode(self, out: Tensor) -> Iterator[Tensor]:
        for data, chunks in self._staging.pieces(out.numel()):
            yield data
            for begin, end, scales, codes in chunks:
                self._add(scales, codes, self.shown[begin:end])
        # What user code has done to this side's own does not last, as where they are sent as they are.
        out.copy_(self.shown)

    def _add(self, scales: Tensor, codes: Tensor, shown: Tensor) -> None:
        step = self._scratch[: shown.numel()]
        dequantize(scales, codes, step)
        shown.add_(step)
        if not bool(scales.isfinite().all()):
            # No difference leads back from there.
            self.needs_exact = True


def _quantize_blocks(values: Tensor, scales: Tensor, codes: Tensor) -> None:
    low, high = values.aminmax(dim=1, keepdim=True)
    torch.maximum(-low, high, out=low)
    scales.copy_(low.div_(_LEVELS))
    # A block that is nearly nothing would divide by nothing; what it has is sent with a later one.
    scales.masked_fill_(scales < _SMALLEST_SCALE, 0.0)
    finite = scales.isfinite()
    all_finite = bool(finite.all())
    if not all_finite:
        scales.masked_fill_(~finite, torch.nan)
        values.masked_fill_(~finite, 0.0)
    # The largest value of all would overflow when it is read.
    scales.clamp_(max=_LARGEST_SCALE)
    inverse = scales.reciprocal().masked_fill_(~((scales > 0) & finite), 0.0)
    rounded = (values * inverse).round_()
    codes.copy_(rounded)
    # As the receiver does it, so that nothing is lost that is not noted.
    values.sub_(torch.mul(codes, scales if all_finite else scales.masked_fill(~finite, 0.0), out=rounded))
