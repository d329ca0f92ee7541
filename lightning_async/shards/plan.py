"""Which part of the flat vector each shard holds: rules without state, and what cuts and joins what lies in it."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_async.holder.held_state import StateByPlace

__all__ = ["Piece", "ShardPlan", "plan_shards"]

# A kernel rounds the elements that fill no vector register differently, so a tensor is cut at whole ones: the longest
# register has 16 elements of float32.
_ALIGNMENT = 16


class Piece(NamedTuple):
    """A part of a parameter, or a whole one.

    Attributes:
        parameter: place of the parameter among those that travel.
        start: first element.
        stop: the element after the last one.
        shape: the parameter's own if it is whole, else ``(stop - start,)``.
        is_whole: whether it is.
    """

    parameter: int
    start: int
    stop: int
    shape: tuple[int, ...]
    is_whole: bool


@dataclass(frozen=True)
class ShardPlan:
    """Who holds what of one optimizer's parameters.

    Args:
        shapes: of the parameters that travel.
        borders: where the shards' parts of the flat vector begin, and the vector's end.
    """

    shapes: tuple[tuple[int, ...], ...]
    borders: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of shards."""
        return len(self.borders) - 1

    @property
    def numel(self) -> int:
        """Size of the flat vector."""
        return self.borders[-1]

    def part(self, shard: int) -> slice:
        """A shard's part of the flat vector."""
        return slice(self.borders[shard], self.borders[shard + 1])

    def pieces(self, shard: int) -> list[Piece]:
        """What lies in that part, in the order of the vector.

        Examples:
            >>> plan = ShardPlan(shapes=((2, 24), (4,)), borders=(0, 32, 52))
            >>> [(piece.parameter, piece.start, piece.stop) for piece in plan.pieces(1)]
            [(0, 32, 48), (1, 0, 4)]
        """
        begin, end = self.borders[shard], self.borders[shard + 1]
        pieces, offset = [], 0
        for place, shape in enumerate(self.shapes):
            size = math.prod(shape)
            start, stop = max(begin - offset, 0), min(end - offset, size)
            if size == 0 and self._shard_at(offset) == shard:
                pieces.append(Piece(place, 0, 0, shape, True))
            elif start < stop:
                whole = (start, stop) == (0, size)
                pieces.append(Piece(place, start, stop, shape if whole else (stop - start,), whole))
            offset += size
        return pieces

    def _shard_at(self, element: int) -> int:
        return min(bisect.bisect_right(self.borders, element) - 1, self.count - 1)

    # --- cutting -----------------------------------------------------------------------------------------------------

    def cut_tensors(self, tensors: Sequence[Tensor | None], shard: int, copies: bool = False) -> list[Tensor | None]:
        """A shard's pieces of what there is one of for each parameter.

        Args:
            tensors: one for each parameter, or None.
            shard: whose pieces.
            copies: whether they are to own their memory, as what is sent must: a view is sent with its whole storage.
        """
        return [_cut(tensors[piece.parameter], piece, copies) for piece in self.pieces(shard)]

    def cut_state(self, state: StateByPlace, shard: int, copies: bool = False) -> dict[int, Any]:
        """A shard's part of what an optimizer keeps, by the places of its pieces.

        Args:
            state: by the places of the parameters.
            shard: whose part.
            copies: whether its tensors are to own their memory.
        """
        return {
            place: self._cut_entry(state[piece.parameter], piece, copies)
            for place, piece in enumerate(self.pieces(shard))
            if piece.parameter in state
        }

    def _cut_entry(self, own: Any, piece: Piece, copies: bool) -> Any:
        if not isinstance(own, Mapping):
            return own
        shape = self.shapes[piece.parameter]
        return {
            key: _cut(value, piece, copies) if isinstance(value, Tensor) and value.shape == shape else value
            for key, value in own.items()
        }

    # --- joining -----------------------------------------------------------------------------------------------------

    def join_tensors(self, parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Inverse of `cut_tensors`: for each parameter its tensor; None where its pieces are None."""
        found: list[list[Tensor | None]] = [[] for _ in self.shapes]
        for shard, part in enumerate(parts):
            for piece, tensor in zip(self.pieces(shard), part, strict=True):
                found[piece.parameter].append(tensor)
        return [self._join(place, pieces) for place, pieces in enumerate(found)]

    def join_state(self, parts: Sequence[StateByPlace]) -> dict[int, Any]:
        """Inverse of `cut_state`."""
        found: dict[int, list[tuple[Piece, Any]]] = {}
        for shard, part in enumerate(parts):
            for place, piece in enumerate(self.pieces(shard)):
                if place in part:
                    found.setdefault(piece.parameter, []).append((piece, part[place]))
        return {place: self._join_entry(place, found[place]) for place in sorted(found)}

    def _join_entry(self, place: int, pieces: Sequence[tuple[Piece, Any]]) -> Any:
        (first, own), *others = pieces
        if first.is_whole or not isinstance(own, Mapping):
            return own
        joined = {}
        for key, value in own.items():
            # What is of another size, such as a count of steps, is one and the same in all pieces.
            cut = isinstance(value, Tensor) and value.shape == first.shape
            joined[key] = self._join(place, [value, *(entry[key] for _, entry in others)]) if cut else value
        return joined

    def _join(self, place: int, pieces: Sequence[Tensor | None]) -> Tensor | None:
        there = [piece for piece in pieces if piece is not None]
        if len(pieces) == 1 or not there:
            return pieces[0]
        return torch.cat(there).view(self.shapes[place])


def plan_shards(shapes: Sequence[Sequence[int]], shards: int, cuts_parameters: bool) -> ShardPlan:
    """Deals a flat vector to shards, in parts as equal as may be.

    Args:
        shapes: of the parameters that travel, in the order of the vector.
        shards: how many; a small model has fewer, and never an empty one.
        cuts_parameters: whether a parameter may be cut, where that changes no bit.

    Examples:
        >>> plan_shards([(100,), (3,)], shards=2, cuts_parameters=True).borders
        (0, 48, 103)
        >>> plan_shards([(100,), (3,)], shards=2, cuts_parameters=False).borders
        (0, 100, 103)
        >>> plan_shards([(4,)], shards=2, cuts_parameters=True).borders
        (0, 4)
    """
    sizes = [math.prod(shape) for shape in shapes]
    ends = [*itertools.accumulate(sizes, initial=0)]
    inner = set()
    for shard in range(1, shards):
        target = round(shard * ends[-1] / shards)
        candidates = {*ends}
        for start, stop in itertools.pairwise(ends):
            if cuts_parameters and start <= target <= stop:
                below = start + (target - start) // _ALIGNMENT * _ALIGNMENT
                candidates |= {border for border in (below, below + _ALIGNMENT) if border < stop}
        inner.add(min(candidates, key=lambda border: (abs(border - target), border)))
    return ShardPlan(tuple(map(tuple, shapes)), (0, *sorted(inner - {0, ends[-1]}), ends[-1]))


def _cut(tensor: Tensor | None, piece: Piece, copies: bool) -> Tensor | None:
    if tensor is None:
        return None
    part = tensor.detach()
    if not piece.is_whole:
        part = part.reshape(-1)[piece.start : piece.stop]
    return part.clone() if copies else part
