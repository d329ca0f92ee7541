"""Counts that all ranks add up while none of them waits: steps, batches, calls of a scheduler.

A rank reports what it has counted with its next message to the holder; the answer brings the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_async.transport.fields import pack_counts

__all__ = ["BATCHES", "STEPS", "Tally", "add_counts"]

# Where the first counts stand; those of schedulers come behind.
STEPS, BATCHES = 0, 1


class Tally:
    """A rank's counts since its last report, and the sums over all ranks as far as this one has heard.

    Args:
        totals: the sums to begin with.

    Examples:
        >>> from lightning_async.transport.fields import unpack_counts
        >>> tally = Tally([10, 10])
        >>> tally.add(STEPS)
        >>> tally.total(STEPS), tally.known(STEPS)
        (10, 11)
        >>> tally.hear(add_counts(add_counts([10, 10], unpack_counts(tally.take())), [2, 0]))
        >>> tally.total(STEPS), tally.known(STEPS)
        (13, 13)
    """

    def __init__(self, totals: Sequence[int]) -> None:
        self._own = [0] * len(totals)
        self._totals = tuple(totals)

    def extend(self, count: int) -> None:
        """Makes room for ``count`` counts."""
        self._own += [0] * (count - len(self._own))

    def add(self, place: int, count: int = 1) -> None:
        """Counts ``count`` more."""
        self._own[place] += count

    def total(self, place: int) -> int:
        """The sum over all ranks, as last heard."""
        return self._totals[place] if place < len(self._totals) else 0

    def known(self, place: int) -> int:
        """The same with what this rank has not reported yet."""
        return self.total(place) + self._own[place]

    @property
    def has_news(self) -> bool:
        """Whether there is something to report."""
        return any(self._own)

    def take(self) -> bytes:
        """What to report, packed; from here on it is reported."""
        packed = pack_counts(self._own)
        self._own = [0] * len(self._own)
        return packed

    def hear(self, totals: Sequence[int]) -> None:
        """Notes the sums over all ranks."""
        self._totals = tuple(totals)
        self.extend(len(self._totals))

    @property
    def totals(self) -> tuple[int, ...]:
        """The sums over all ranks, as last heard."""
        return self._totals


def add_counts(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Adds counts place by place; the shorter is filled up with zeros.

    Examples:
        >>> add_counts([1, 2], [10])
        [11, 2]
    """
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    return [count + (shorter[place] if place < len(shorter) else 0) for place, count in enumerate(longer)]
