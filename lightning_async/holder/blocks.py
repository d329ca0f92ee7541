"""Where a large model's parameters are cut, so that parts of them give the bits of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["BLOCK", "LARGE", "UNIT", "Block", "Piece", "cut"]

# torch's fused kernels round the elements that do not fill a vector otherwise, 16 at most of them; so tensors are cut
# at multiples of this many elements, which are also whole lines of the cache.
UNIT = 64
# From how many parameters on an update is work for several threads, and pushes that wait are worth one pass.
LARGE = 1_000_000
# Parameters of a block that several gradients are applied to while it is in the cache (`benchmarks/holder.py`).
BLOCK = 131_072


class Piece(NamedTuple):
    """A part of one tensor.

    Attributes:
        tensor: its place among the tensors.
        start: its first element.
        stop: the element after its last one.
    """

    tensor: int
    start: int
    stop: int


class Block(NamedTuple):
    """A part of tensors that lie in a row.

    Attributes:
        start: its first element, counted over all tensors.
        stop: the element after its last one.
        pieces: the parts of tensors that it consists of.
    """

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def cut(sizes: Sequence[int], block: int) -> list[Block]:
    """Cuts tensors that lie in a row into blocks of about one size.

    Each tensor is cut at multiples of `UNIT` of its own elements, or not at all.

    Args:
        sizes: number of elements of each tensor.
        block: the size of a block.

    Examples:
        >>> [(found.start, found.stop) for found in cut([100, 10, 300], block=128)]
        [(0, 110), (110, 238), (238, 366), (366, 410)]
        >>> cut([100, 10, 300], block=128)[2].pieces
        (Piece(tensor=2, start=128, stop=256),)
    """
    starts = [0, *itertools.accumulate(sizes)]
    borders = sorted({0, *_borders(sizes, starts, block), starts[-1]})
    first = 0
    blocks = []
    for start, stop in itertools.pairwise(borders):
        while first < len(sizes) and starts[first + 1] <= start:
            first += 1
        pieces = tuple(_pieces(sizes, starts, first, start, stop))
        if pieces:
            blocks.append(Block(start, stop, pieces))
    return blocks


def _borders(sizes: Sequence[int], starts: Sequence[int], block: int) -> Iterator[int]:
    tensor, border, block = 0, 0, max(block, UNIT)
    while border + block < starts[-1]:
        border += block
        while starts[tensor + 1] <= border:
            tensor += 1
        within = border - starts[tensor]
        border = starts[tensor] + within // UNIT * UNIT
        yield border


def _pieces(sizes: Sequence[int], starts: Sequence[int], first: int, start: int, stop: int) -> Iterator[Piece]:
    for tensor in range(first, len(sizes)):
        begins = starts[tensor]
        if begins >= stop:
            return
        piece = Piece(tensor, max(start - begins, 0), min(stop - begins, sizes[tensor]))
        if piece.start < piece.stop:
            yield piece
