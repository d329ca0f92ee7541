"""How long both launchers wait: for ranks that end, and before they start a lost one again."""

from __future__ import annotations

__all__ = ["END_TIMEOUT_S", "POLL_S", "back_off_s"]

# The ranks end by themselves when one of them fails, at the latest by their exit guards, five seconds later.
END_TIMEOUT_S = 8.0
# Between two looks at whether they have.
POLL_S = 0.5

# Before a lost rank is started again: at once, then twice as long each time.
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 60.0


def back_off_s(count: int) -> float:
    """Seconds to wait before a rank is started for the ``count``-th time again.

    Examples:
        >>> [back_off_s(count) for count in (1, 2, 3, 4, 50)]
        [0.0, 1.0, 2.0, 4.0, 60.0]
    """
    return 0.0 if count == 1 else min(_FIRST_BACK_OFF_S * 2 ** min(count - 2, 30), _LONGEST_BACK_OFF_S)
