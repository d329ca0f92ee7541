"""Which ranks are in a run, and whether it goes on when one is lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

__all__ = ["OnWorkerFailure", "Resilience", "Roster", "is_out_of_memory"]

OnWorkerFailure: TypeAlias = Literal["continue", "stop"]


@dataclass(frozen=True, slots=True)
class Resilience:
    """What becomes of a run when one of its ranks is lost.

    Args:
        on_worker_failure: ``"stop"`` ends the run, as under DDP; ``"continue"`` goes on without the rank.
        min_ranks: fewer ranks than these do not go on.
        max_restarts: how often in a row a lost rank that was started from here is started again, where the run goes on.
        join_file: where rank 0 leaves what other workers join the run with; None if none may.

    Raises:
        ValueError: if one of them has no meaning.

    Examples:
        >>> Resilience("continue", min_ranks=2).goes_on
        True
        >>> Resilience("sometimes")
        Traceback (most recent call last):
        ValueError: on_worker_failure must be "continue" or "stop", not 'sometimes'.
    """

    on_worker_failure: OnWorkerFailure = "stop"
    min_ranks: int = 1
    max_restarts: int = 0
    join_file: str | Path | None = None

    def __post_init__(self) -> None:
        if self.on_worker_failure not in ("continue", "stop"):
            raise ValueError(f'on_worker_failure must be "continue" or "stop", not {self.on_worker_failure!r}.')
        for name, least in (("min_ranks", 1), ("max_restarts", 0)):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, not {value!r}.")

        if self.join_file is not None and not self.goes_on:
            raise ValueError('join_file takes on_worker_failure="continue".')

    @property
    def goes_on(self) -> bool:
        """Whether a run survives the loss of a rank."""
        return self.on_worker_failure == "continue"


class Roster:
    """The ranks in a run, as rank 0 knows them.

    Args:
        ranks: those that the run begins with.
        min_ranks: fewer do not go on.

    Attributes:
        generation: how often the ranks have changed.
        lost: the ranks that were taken out, in that order, and why.

    Examples:
        >>> roster = Roster(range(3), min_ranks=2)
        >>> roster.remove(1, "its process was killed by SIGKILL"), roster.living
        (True, (0, 2))
        >>> roster.remove(2, "gave no sign of life"), roster.living
        (False, (0, 2))
        >>> roster.next_incarnation(1), roster.add(1), roster.living
        (1, None, (0, 1, 2))
    """

    def __init__(self, ranks: Iterable[int], min_ranks: int = 1) -> None:
        self._min_ranks = min_ranks
        self._living = set(ranks)
        self._incarnations = dict.fromkeys(self._living, 0)
        self.generation = 0
        self.lost: list[tuple[int, str]] = []

    @property
    def living(self) -> tuple[int, ...]:
        """The ranks in the run, in rising order."""
        return tuple(sorted(self._living))

    def __contains__(self, rank: object) -> bool:
        return rank in self._living

    def next_incarnation(self, rank: int) -> int:
        """The number of the next worker that is to be a rank; another one each time."""
        self._incarnations[rank] = self._incarnations.get(rank, -1) + 1
        return self._incarnations[rank]

    def is_latest(self, rank: int, incarnation: int) -> bool:
        """Whether no later worker is to be that rank."""
        return self._incarnations.get(rank) == incarnation

    def next_rank(self) -> tuple[int, int]:
        """A rank that nobody has been, and its incarnation."""
        rank = max(self._incarnations) + 1
        return rank, self.next_incarnation(rank)

    def can_lose(self, rank: int) -> bool:
        """Whether the run can go on without a rank."""
        return rank != 0 and rank in self._living and len(self._living) > self._min_ranks

    def remove(self, rank: int, reason: str) -> bool:
        """Takes a rank out; False, with nothing changed, if the run cannot go on without it.

        Rank 0 has the holder, and fewer ranks than ``min_ranks`` do not go on.
        """
        if not self.can_lose(rank):
            return False
        self._living.discard(rank)
        self.generation += 1
        self.lost.append((rank, reason))
        return True

    def add(self, rank: int) -> None:
        """Takes a rank in that was lost, or is new.

        Raises:
            ValueError: if it is in the run.
        """
        if rank in self._living:
            raise ValueError(f"rank {rank} is in the run")
        self._living.add(rank)
        self.generation += 1


def is_out_of_memory(reason: str) -> bool:
    """Whether an error, as `describe_error` tells it, is that there was no memory, on the host or on the GPU.

    Examples:
        >>> is_out_of_memory("MemoryError: out of memory"), is_out_of_memory("ValueError: out of memory")
        (True, False)
    """
    return reason.startswith(("MemoryError", "OutOfMemoryError", "out of memory"))
