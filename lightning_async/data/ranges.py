"""Sets of tickets kept as ranges: what has been applied, and what is left to hand out.

An epoch may have millions of tickets, or no known end; what is applied of it is one range and a few stragglers.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator

__all__ = ["UNBOUNDED", "RangeSet", "TicketQueue"]

# More tickets than any run draws: the size of an epoch whose end nobody knows beforehand.
UNBOUNDED = 1 << 60


class RangeSet:
    """A set of non-negative integers, kept as disjoint ranges in rising order.

    Args:
        ranges: ``(start, stop)`` pairs, in any order; they may overlap.

    Examples:
        >>> applied = RangeSet([(0, 3)])
        >>> applied.add(4, 5)
        >>> applied.pairs(), len(applied), 4 in applied
        ([(0, 3), (4, 5)], 4, True)
        >>> applied.add(3, 4)
        >>> applied.pairs()
        [(0, 5)]
        >>> applied.missing(8)
        [(5, 8)]
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._count = 0
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Adds ``start`` to ``stop - 1``; nothing if the range is empty."""
        if stop <= start:
            return
        # The ranges that touch this one become one with it.
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if last - first == 1 and self._stops[first] == start:
            # The usual case, as tickets are applied nearly in their order.
            self._stops[first] = stop
            self._count += stop - start
            return
        self._count -= sum(self._stops[index] - self._starts[index] for index in range(first, last))
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        self._count += stop - start

    def pairs(self) -> list[tuple[int, int]]:
        """The ranges as ``(start, stop)``."""
        return list(zip(self._starts, self._stops, strict=True))

    def missing(self, stop: int) -> list[tuple[int, int]]:
        """What the set lacks of ``range(stop)``, as ranges."""
        gaps, position = [], 0
        for start, end in zip(self._starts, self._stops, strict=True):
            if start >= stop:
                break
            if position < start:
                gaps.append((position, start))
            position = end
        if position < stop:
            gaps.append((position, stop))
        return gaps

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number < self._stops[index]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield from range(start, stop)


class TicketQueue:
    """The tickets that one share of the workers may still draw, in rising order.

    Blocks of ``block`` tickets are dealt out to ``shares`` in turn; this queue has those of one share.

    Args:
        ranges: the tickets that are left of the epoch, over all shares, as disjoint ranges in rising order.
        block: tickets that are handed out at once.
        share: which share this queue has.
        shares: number of shares.

    Examples:
        >>> queue = TicketQueue([(0, 5), (7, 12)], block=2, share=1, shares=2)
        >>> queue.count, queue.take(9), queue.take(9), queue.take(1)
        (5, range(2, 4), range(7, 8), range(10, 11))
        >>> queue.put_back(2), queue.take(9), queue.take(9), queue.take(9)
        (None, range(2, 3), range(11, 12), range(0, 0))
    """

    def __init__(self, ranges: Iterable[tuple[int, int]], block: int = 1, share: int = 0, shares: int = 1) -> None:
        self._ranges = deque(ranges)
        self._block = block
        self._share = share
        self._shares = shares
        self._returned: list[int] = []

    @property
    def count(self) -> int:
        """Number of tickets that are left."""
        return self.count_below(UNBOUNDED)

    def count_below(self, ticket: int) -> int:
        """Number of tickets that are left and come before ``ticket``."""
        left = sum(1 for returned in self._returned if returned < ticket)
        for start, stop in self._ranges:
            if start >= ticket:
                break
            left += self._owned_below(min(stop, ticket)) - self._owned_below(start)
        return left

    def take(self, limit: int) -> range:
        """Takes the next run of tickets of one block, at most ``limit``; an empty range if there is none."""
        if limit <= 0:
            return range(0)
        if self._returned:
            return self._take_returned(limit)
        while self._ranges:
            start, stop = self._ranges.popleft()
            first = self._first_owned(start)
            if first >= stop:
                continue
            end = min(first - first % self._block + self._block, stop, first + limit)
            if end < stop:
                self._ranges.appendleft((end, stop))
            return range(first, end)
        return range(0)

    def put_back(self, ticket: int) -> None:
        """Puts back a ticket that was taken; it is handed out before those that never were."""
        heapq.heappush(self._returned, ticket)

    def clear(self) -> None:
        """Drops what is left."""
        self._ranges.clear()
        self._returned.clear()

    def _take_returned(self, limit: int) -> range:
        first = heapq.heappop(self._returned)
        end, last = first + 1, first - first % self._block + self._block
        while end < min(last, first + limit) and self._returned and self._returned[0] == end:
            heapq.heappop(self._returned)
            end += 1
        return range(first, end)

    def _owned_below(self, ticket: int) -> int:
        """Tickets of this share in ``range(ticket)``."""
        turns, rest = divmod(ticket, self._block * self._shares)
        return turns * self._block + min(max(rest - self._share * self._block, 0), self._block)

    def _first_owned(self, ticket: int) -> int:
        """The first ticket of this share that is not before ``ticket``."""
        turn = ticket - ticket % (self._block * self._shares)
        begin = turn + self._share * self._block
        if ticket < begin:
            return begin
        return ticket if ticket < begin + self._block else begin + self._block * self._shares
