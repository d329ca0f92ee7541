"""Turns on rank 0's network: large payloads one after the other, where one alone uses all of it.

Workers that push and pull over one thin link share it like customers of one counter. If two payloads go at the same
time, both come late, and the other direction is idle meanwhile: two workers then get two thirds of a full-duplex link.
One after the other, the first one's answer travels while the second one's gradient does.

Where a payload does not use the link, since its own worker's is thinner, nobody waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["LinkShare"]

# Smaller ones are through before it matters.
_LEAST_BYTES = 1 << 20
# So long nobody knows how fast a payload is.
_UNKNOWN_S = 0.1
# A payload that has less than this part of the link leaves room for another.
_BUSY_FRACTION = 0.5
# Memory of one host and the like: processors are what is shared there.
_FAST_BYTES_PER_S = 500e6
_LOOK_S = 0.05


@dataclass(eq=False, slots=True)
class _Transfer:
    started: float
    alone: bool
    moved: int = 0


class LinkShare:
    """One direction of a host's network.

    Args:
        now: the clock, in seconds.

    Examples:
        >>> share = LinkShare()
        >>> with share.turn(4 << 20, longest_s=1.0) as moved:
        ...     moved(4 << 20)
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._changed = threading.Condition()
        self._queue: list[object] = []
        self._under_way: list[_Transfer] = []
        # Of the last payload that had the link for itself; it may become slower, too.
        self._rate = 0.0

    @contextmanager
    def turn(self, size_bytes: int, longest_s: float) -> Iterator[Callable[[int], None]]:
        """Waits until there is room for a payload; gives what is to be told of its bytes as they move.

        Args:
            size_bytes: of the payload.
            longest_s: after so long it goes all the same.
        """
        if size_bytes < _LEAST_BYTES:
            yield lambda count: None
            return
        transfer = self._begin(longest_s)

        def moved(count: int) -> None:
            transfer.moved += count

        try:
            yield moved
        finally:
            self._end(transfer)

    def _begin(self, longest_s: float) -> _Transfer:
        deadline = self._now() + longest_s
        me = object()
        with self._changed:
            self._queue.append(me)
            while (self._queue[0] is not me or self._is_busy()) and self._now() < deadline:
                # Also without news: whether a payload uses the link is a matter of time.
                self._changed.wait(_LOOK_S)
            self._queue.remove(me)
            transfer = _Transfer(self._now(), alone=not self._under_way)
            for other in self._under_way:
                other.alone = False
            self._under_way.append(transfer)
            self._changed.notify_all()
        return transfer

    def _end(self, transfer: _Transfer) -> None:
        with self._changed:
            self._under_way.remove(transfer)
            passed_s = self._now() - transfer.started
            if transfer.alone and passed_s > 0 and transfer.moved:
                self._rate = max(transfer.moved / passed_s, self._rate / 2)
            self._changed.notify_all()

    def _is_busy(self) -> bool:
        if self._rate > _FAST_BYTES_PER_S:
            return False
        now = self._now()
        for transfer in self._under_way:
            passed_s = now - transfer.started
            if passed_s < _UNKNOWN_S or transfer.moved >= _BUSY_FRACTION * self._rate * passed_s:
                return True
        return False
