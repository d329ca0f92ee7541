"""How often something may happen: a bucket of tokens that fills by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pace"]


class Pace:
    """Allows ``burst`` at once, and ``per_s`` a second in the long run.

    Args:
        burst: size of the bucket.
        per_s: how many come back a second.
        now: the clock, in seconds.

    Examples:
        >>> clock = iter([0.0, 0.0, 0.0, 0.5])
        >>> pace = Pace(1, 2.0, lambda: next(clock))
        >>> pace.allows(), pace.allows(), pace.allows()
        (True, False, True)
    """

    def __init__(self, burst: float, per_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_s = per_s
        self._now = now
        self._left, self._since = float(burst), now()

    def allows(self) -> bool:
        """Whether it may happen now; if so, it counts as done."""
        now = self._now()
        self._left = min(self._burst, self._left + (now - self._since) * self._per_s)
        self._since = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
