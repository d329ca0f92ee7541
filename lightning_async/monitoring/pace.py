"""How often something is written whose cost grows with a run."""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """Every few seconds, and more seldom where writing takes long: it never takes more than a small part of the time.

    Args:
        every_s: seconds between two writings at least.
        part: of the time that may be spent in writing.

    Attributes:
        spent_s: seconds spent in writing so far.

    Examples:
        >>> pace = Pace(every_s=5.0, part=0.005)
        >>> pace.wrote(0.0, took_s=0.01)
        >>> pace.due(4.9), pace.due(5.0)
        (False, True)
        >>> pace.wrote(5.0, took_s=0.1)
        >>> pace.due(24.9), pace.due(25.0)
        (False, True)
    """

    def __init__(self, every_s: float = 5.0, part: float = 0.005) -> None:
        self.spent_s = 0.0
        self._every_s = every_s
        self._part = part
        self._next_s = 0.0

    def due(self, now_s: float) -> bool:
        """Whether it is time to write."""
        return now_s >= self._next_s

    def wrote(self, now_s: float, took_s: float) -> None:
        """Notes that something was written.

        Args:
            now_s: when that was begun.
            took_s: seconds it took.
        """
        self.spent_s += took_s
        self._next_s = now_s + max(self._every_s, took_s / self._part)
