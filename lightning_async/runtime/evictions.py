"""Rank 0's decision when a rank is lost: the run goes on without it, or ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lightning_async.runtime.failure import FailureLatch, RunFailure, say
from lightning_async.runtime.roster import Roster, is_out_of_memory

__all__ = ["Evictions"]

# How long the heartbeat's news (what became of the rank) may trail a lost connection.
_NEWS_TIMEOUT_S = 3.0


class Evictions:
    """Takes lost ranks out of a run that goes on without them.

    Args:
        roster: who is in the run.
        latch: the run's failure latch, tripped where the run cannot go on.

    Attributes:
        under_way: whether the ranks train: one that is lost before or after ends the run.
        before: what is done before a rank is out of the roster: a meeting that does without it finds what it was handed
            handed back. Called with its rank and what happened to it; what they return is added to the line that
            tells of it.
        steps: the same, for what is done when it is out; in this order.
        lets_go: whether the rank that the steps are about leaves by itself.
        deciding: held while it is decided what becomes of a rank.
        restart: has a lost rank started again, and says what becomes of it; None where nothing does.
        lose_joiner: told of a rank that is lost before it is in the run.
    """

    def __init__(self, roster: Roster, latch: FailureLatch) -> None:
        self.roster = roster
        self.under_way = False
        self.before: list[Callable[[int, str], str | None]] = []
        self.steps: list[Callable[[int, str], str | None]] = []
        self.lets_go = False
        self.restart: Callable[[RunFailure], str | None] | None = None
        self.lose_joiner: Callable[[RunFailure], object] = lambda failure: None
        self._latch = latch
        self.deciding = threading.RLock()
        self._changed = threading.Condition()
        # Who waits for the news of a rank waits no longer than for the run's end.
        latch.subscribe(lambda failure: self._tell())

    def lose(self, failure: RunFailure, leaves: bool = False) -> None:
        """A rank is lost: takes it out, or ends the run. Idempotent; for any thread.

        Args:
            failure: the rank, and what happened to it.
            leaves: whether it leaves by itself.
        """
        with self.deciding:
            rank, reason = failure.rank, failure.reason
            if self._latch.failure is not None or (rank != 0 and rank not in self.roster):
                return
            if not self.under_way or not self.roster.can_lose(rank):
                self._latch.trip(failure)
                return
            self.lets_go = leaves
            told = [step(rank, reason) for step in list(self.before)]
            self.roster.remove(rank, reason)
            told += [step(rank, reason) for step in list(self.steps)]
            if not leaves and self.restart is not None:
                told.append(self.restart(failure))
            ranks = len(self.roster.living)
            go_on = f"{ranks} rank{'s' if ranks > 1 else ''} go{'' if ranks > 1 else 'es'} on without it"
            what = "leaves" if leaves else "is lost"
            say(0, "; ".join(filter(None, (f"rank {rank} {what}: {reason}", go_on, *told))))
        self._tell()

    def lose_peer(self, failure: RunFailure) -> None:
        """A rank that was watched over is lost, or one that was about to join; for any thread."""
        if failure.rank != 0 and failure.rank not in self.roster:
            self.lose_joiner(failure)
        else:
            self.lose(failure)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def fail(self, failure: RunFailure) -> None:
        """A rank says that it has failed: an error of user code ends the run, a lack of memory is a loss."""
        if failure.rank not in self.roster:
            say(0, f"rank {failure.rank}, which was about to join, failed: {failure.reason}")
        elif is_out_of_memory(failure.reason):
            self.lose(failure)
        else:
            self._latch.trip(failure)

    def let_go(self, failure: RunFailure) -> None:
        """A rank leaves by itself: takes it out, and does not start it again."""
        self.lose(failure, leaves=True)

    def lose_connection(self, rank: int, reason: str) -> None:
        """A connection of a rank's is lost: what has become of it is known in a moment, or else that is what is known.

        Returns once the rank is out, or the run has failed; for any thread.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: rank not in self.roster or self._latch.failure is not None, timeout=_NEWS_TIMEOUT_S
            )
        self.lose(RunFailure(rank, reason))
