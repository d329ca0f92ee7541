"""How often a lost rank is started again, and how long before."""

from __future__ import annotations

import time

__all__ = ["Restarts", "back_off_s"]

# Before a lost rank is started again: at once, then twice as long each time.
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 60.0
# A rank that has lasted for so long was not lost for what it was lost for before.
_LASTING_S = 600.0


def back_off_s(count: int) -> float:
    """Seconds to wait before a rank is started for the ``count``-th time again.

    Examples:
        >>> [back_off_s(count) for count in (1, 2, 3, 4, 50)]
        [0.0, 1.0, 2.0, 4.0, 60.0]
    """
    return 0.0 if count == 1 else min(_FIRST_BACK_OFF_S * 2 ** min(count - 2, 30), _LONGEST_BACK_OFF_S)


class Restarts:
    """Counts how often each rank was started again; of one that has lasted for ten minutes since, anew."""

    def __init__(self) -> None:
        # Each rank's count, and when it was started for the last time.
        self._counted: dict[int, tuple[int, float]] = {}

    def count(self, rank: int, now_s: float | None = None) -> tuple[int, float]:
        """Counts one more of a rank that was lost.

        Args:
            rank: which one.
            now_s: the time; None for the monotonic clock's.

        Returns:
            How many it has had in a row, this one included, and the seconds to wait before it is started.

        Examples:
            >>> restarts = Restarts()
            >>> [restarts.count(1, now_s) for now_s in (0.0, 30.0, 629.0, 1231.0)]
            [(1, 0.0), (2, 1.0), (3, 2.0), (1, 0.0)]
        """
        now_s = time.monotonic() if now_s is None else now_s
        count, started_s = self._counted.get(rank, (0, now_s))
        count = 1 if now_s - started_s >= _LASTING_S else count + 1
        delay_s = back_off_s(count)
        self._counted[rank] = count, now_s + delay_s
        return count, delay_s
