"""The ranks that a run has gone on without, as one rank has heard, and the process group that waits in vain."""

from __future__ import annotations

import threading
from collections.abc import Collection

import torch.distributed as dist

from lightning_async.runtime.failure import RunFailure, describe_error
from lightning_async.runtime.process_groups import break_groups

__all__ = ["Losses", "may_be_lost_peer"]

# How long the news of a lost rank may trail the collective that fails because of it.
_NEWS_TIMEOUT_S = 5.0
_LOST_PEER_WORDS = ("gloo", "nccl", "connection", "socket", "timed out", "store")


class Losses:
    """What one rank has heard of lost ranks.

    A collective that waits for a lost rank is broken off. A group that was formed without that rank goes on, also where
    the news of it comes late.
    """

    def __init__(self) -> None:
        self._lost: list[RunFailure] = []
        self._heard = threading.Condition()
        # Who is in the present process group, or the one that is being formed; None for all that were started.
        self._group: Collection[int] | None = None
        # How many were known to be lost before it was settled who is in it.
        self._known = 0

    @property
    def last(self) -> RunFailure | None:
        """The last one."""
        return self._lost[-1] if self._lost else None

    def end_of_run(self, rank: int) -> RunFailure | None:
        """What ends the run where a lost rank has broken off what cannot be repeated; None if none was lost.

        Args:
            rank: this rank; rank 0 says so.
        """
        if (lost := self.last) is None:
            return None
        return RunFailure(
            lost.rank,
            f"{lost.reason}. The run would have gone on without it, but the others were in a collective of user code "
            "outside of validation, which cannot be repeated (docs/faults.md)",
            announced=rank != 0,
        )

    def hear_of(self, failure: RunFailure) -> None:
        """Notes that the run goes on without a rank, and breaks off what waits for it; for any thread."""
        with self._heard:
            self._lost.append(failure)
            self._heard.notify_all()
        if self._group is None or failure.rank in self._group:
            break_groups()

    def begin_group(self) -> None:
        """A process group is about to be formed; who is lost before it is settled who is in it may be one of them."""
        self._group, self._known = None, len(self._lost)

    def settle_group(self, ranks: Collection[int]) -> None:
        """These are in the group that is about to be formed."""
        self._group = ranks

    def is_group_outdated(self) -> bool:
        """Whether a rank of that group is lost."""
        group = self._group
        return any(group is None or failure.rank in group for failure in self._lost[self._known :])

    def explain(self, error: Exception) -> bool:
        """Whether an error of a collective comes from a rank that was lost since the group was about to be formed.

        Waits a moment for the news of it.

        Args:
            error: what the collective has raised.
        """
        if not may_be_lost_peer(error):
            return False
        with self._heard:
            return self._heard.wait_for(lambda: len(self._lost) > self._known, timeout=_NEWS_TIMEOUT_S)


def may_be_lost_peer(error: BaseException) -> bool:
    """Whether an error is of the kind that a collective ends with when another rank is gone."""
    # ConnectionError: also of a channel that ends while it is being agreed on.
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(word in describe_error(error).lower() for word in _LOST_PEER_WORDS)
