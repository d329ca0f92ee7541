"""Which worker is sick, so that the run must do without it: decisions, without threads, clocks and tensors."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

__all__ = ["RejectionStreaks", "Sick"]

_ANOMALY = "Trainer(detect_anomaly=True) shows where a NaN comes from"
_DIVERGED = f"Lower the learning rate, or clip gradients (gradient_clip_val); {_ANOMALY}"
_SICK = f"Look at this rank's data and its hardware; {_ANOMALY}"


class Sick(NamedTuple):
    """A worker that a run must do without.

    Args:
        worker: which one.
        reason: why, in words that stand behind "rank 2 failed: ".
        everyone: whether most others are as sick, so that a run without this one would be no better.
    """

    worker: int
    reason: str
    everyone: bool = False


class RejectionStreaks:
    """Counts for each worker the pushes in a row that were rejected, since they were not finite.

    Args:
        limit: as many in a row make a worker sick.

    Examples:
        >>> streaks = RejectionStreaks(limit=2)
        >>> [streaks.note(worker, rejected) for worker, rejected in [(0, False), (1, True), (0, False)]]
        [None, None, None]
        >>> sick = streaks.note(1, rejected=True)
        >>> sick.worker, sick.everyone, sick.reason.partition(", ")[0]
        (1, False, '2 gradients in a row were not finite (NaN or infinity)')
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row: Counter[int] = Counter()

    def note(self, worker: int, rejected: bool) -> Sick | None:
        """Notes what became of a worker's push; returns the worker if it is sick.

        Args:
            worker: whose push it was.
            rejected: whether it was rejected.
        """
        self._in_a_row[worker] = self._in_a_row[worker] + 1 if rejected else 0
        count = self._in_a_row[worker]
        # Once: what is done about it takes a moment.
        if count != self._limit:
            return None
        others = [in_a_row for other, in_a_row in self._in_a_row.items() if other != worker]
        what = f"{count} gradients in a row were not finite (NaN or infinity)"
        if not others:
            return Sick(worker, f"{what}. {_DIVERGED}")
        spoiled = sum(map(bool, others))
        if 2 * spoiled > len(others):
            whose = "any other rank's last one" if spoiled == len(others) else "the last one of most other ranks"
            return Sick(worker, f"training has diverged: {what}, nor was {whose}. {_DIVERGED}", True)
        return Sick(worker, f"{what}, and the last ones of other ranks were finite. {_SICK}")

    def forget(self, worker: int) -> None:
        """Forgets a worker that has left."""
        self._in_a_row.pop(worker, None)
