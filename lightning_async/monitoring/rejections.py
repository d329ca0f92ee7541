"""What is said of gradients that are not finite, and when: the first of each rank, the tenth, the hundredth."""

from __future__ import annotations

from collections import Counter

from lightning_async.holder.types import Update

__all__ = ["RejectionNotices"]


class RejectionNotices:
    """Turns rejected pushes into a few lines."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()
        self._next: dict[int, int] = {}

    def line(self, update: Update) -> str | None:
        """What to say of a push; None if nothing is to be said.

        Args:
            update: what became of it.
        """
        if not update.rejected:
            return None
        rank = update.push.worker
        self._count[rank] += 1
        if self._count[rank] < self._next.get(rank, 1):
            return None
        self._next[rank] = 10 * self._count[rank]
        so_far = "" if self._count[rank] == 1 else f"; that makes {self._count[rank]} of this rank"
        batches = "its batch counts" if update.push.batches == 1 else f"its {update.push.batches} batches count"
        return (
            f"a gradient of rank {rank}, computed at version {update.push.version_read}, is not finite (NaN or "
            f"infinity): it is not applied, and {batches} as done{so_far}. reject_nonfinite=False applies such "
            "gradients, as DDP does"
        )
