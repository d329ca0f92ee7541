"""The staleness barrier: who holds parameters of which version, and who waits; no thread, no lock, no tensor."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from typing import TypeAlias, get_args

from lightning_async.holder.staleness import OnStale, admissible, check_bound, is_stale

__all__ = ["Decision", "Reader", "StalenessBarrier"]

# A worker that holds parameters; the holder names it by rank and slot.
Reader: TypeAlias = Hashable


class Decision(enum.Enum):
    """What becomes of a worker's push if it is decided now."""

    APPLY = "apply"
    WAIT = "wait"
    DROP = "drop"


class StalenessBarrier:
    r"""Who holds parameters of which version, and who waits to read; bookkeeping without threads.

    Owns the version counter, the outstanding workers and the queue of readers. It never waits: the holder
    calls it under its own lock, parks whoever is told to wait, and asks again after every `apply`,
    `discard` and `leave`.

    With ``on_stale="wait"`` the outstanding set is feasible at the present version at all times: `read`
    requires it of the set with the reader, `apply` of the set without the applied update one version later,
    and leaving only moves the others up. Two things follow.

    - No applied update is staler than the bound: feasibility at :math:`k` includes
      :math:`k \le r_i + \tau` for every member.
    - No deadlock: the oldest reader may always be applied. Without it the rest is :math:`r_1, r_2, \dots`
      at version :math:`k + 1`, which needs :math:`(k + 1) + (i - 1) \le r_i + \tau`: that is the
      invariant. A push waits only for workers that read before it, and those wait for fewer still.

    A reader waits only while :math:`\tau + 1` workers are outstanding, whichever reader it is; so serving
    readers in the order of their asking costs nothing and starves nobody.

    With ``on_stale="drop"`` nobody waits: a push with :math:`k - r > \tau` is discarded.

    Args:
        max_staleness: the bound :math:`\tau` in updates; None bounds nothing.
        on_stale: whether the bound is kept by waiting or by dropping.
        version: the version to start from.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> barrier = StalenessBarrier(max_staleness=1)
        >>> for worker in (0, 1):
        ...     barrier.ask(worker)
        ...     _ = barrier.read(worker)
        >>> barrier.apply(0)
        0
        >>> barrier.ask(0)
        >>> barrier.read(0)
        1
        >>> barrier.decision(0)  # worker 1 read version 0 and would be two updates stale
        <Decision.WAIT: 'wait'>
        >>> barrier.apply(1), barrier.decision(0)
        (1, <Decision.APPLY: 'apply'>)
    """

    def __init__(self, max_staleness: int | None, on_stale: OnStale = "wait", version: int = 0) -> None:
        check_bound(max_staleness)
        _check_version(version)
        if on_stale not in get_args(OnStale):
            raise ValueError(f"on_stale must be 'wait' or 'drop', not {on_stale!r}.")
        self.max_staleness = max_staleness
        self.on_stale = on_stale
        self._version = version
        self._reads: dict[Reader, int] = {}
        # A dict, as the ordered set that the standard library lacks.
        self._readers: dict[Reader, None] = {}
        # The only case in which anybody ever waits.
        self._waits_for = max_staleness if on_stale == "wait" else None

    @property
    def version(self) -> int:
        """Number of updates applied so far. Settable (to load a checkpoint) while nobody is outstanding."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        _check_version(version)
        if self._reads:
            raise ValueError(f"The version cannot be set while workers {[*self._reads]} hold an earlier one.")
        self._version = version

    @property
    def outstanding(self) -> Mapping[Reader, int]:
        """Worker -> version read, for every worker that holds parameters; a copy."""
        return dict(self._reads)

    def held(self, worker: Reader) -> int | None:
        """The version that a worker holds; None if it is not outstanding."""
        return self._reads.get(worker)

    @property
    def waiting(self) -> tuple[Reader, ...]:
        """The workers that have asked and not read, in the order of their asking."""
        return tuple(self._readers)

    def ask(self, worker: Reader) -> None:
        """Puts a worker at the end of the queue of readers; where it is queued already it keeps its place.

        Args:
            worker: who asks.

        Raises:
            ValueError: if it is outstanding.
        """
        if worker in self._reads:
            raise ValueError(f"Worker {worker} still holds version {self._reads[worker]} and cannot read again.")
        self._readers.setdefault(worker)

    def may_read(self, worker: Reader) -> bool:
        """Whether `read` would succeed now.

        Args:
            worker: who would read.

        Returns:
            False for a worker that is outstanding. Otherwise True where nobody waits (``"drop"`` or no
            bound); else whether it is the first in the queue and the set with it stays feasible.
        """
        if worker in self._reads:
            return False
        if self._waits_for is None:
            return True
        # `readable`, given the invariant: the newcomer's is the latest deadline, and it comes last.
        return len(self._reads) <= self._waits_for and next(iter(self._readers), None) == worker

    def read(self, worker: Reader) -> int:
        """Makes a worker outstanding at the present version and takes it out of the queue.

        Args:
            worker: who reads.

        Returns:
            The version it was given.

        Raises:
            ValueError: if it may not read now.
        """
        if not self.may_read(worker):
            raise ValueError(f"Worker {worker} may not read version {self._version} now.")
        self._readers.pop(worker, None)
        self._reads[worker] = self._version
        return self._version

    def decision(self, worker: Reader) -> Decision:
        """What becomes of a worker's push if it is decided now.

        Args:
            worker: whose push it is.

        Returns:
            `Decision.WAIT` only with ``on_stale="wait"``, `Decision.DROP` only with ``on_stale="drop"``.

        Raises:
            ValueError: if the worker is not outstanding.
        """
        read = self._version_read(worker)
        if self.on_stale == "drop":
            return Decision.DROP if is_stale(read, self._version, self.max_staleness) else Decision.APPLY
        if self._waits_for is None:
            return Decision.APPLY
        rest = [other_read for other, other_read in self._reads.items() if other != worker]
        return Decision.APPLY if admissible(rest, self._version, self._waits_for) else Decision.WAIT

    def apply(self, worker: Reader) -> int:
        """Counts a worker's update; it is outstanding no more.

        Args:
            worker: whose update is applied.

        Returns:
            The staleness of the update: the version before it, less the version read.

        Raises:
            ValueError: unless the decision is `Decision.APPLY`.
        """
        return self._settle(worker, Decision.APPLY)

    def discard(self, worker: Reader) -> int:
        """Drops a worker's push without an update; it is outstanding no more.

        Args:
            worker: whose push is dropped.

        Returns:
            The staleness that it would have had.

        Raises:
            ValueError: unless the decision is `Decision.DROP`.
        """
        return self._settle(worker, Decision.DROP)

    def leave(self, worker: Reader) -> None:
        """Forgets a worker wherever it stands: released without a push, or evicted. Idempotent.

        Args:
            worker: who leaves.
        """
        self._reads.pop(worker, None)
        self._readers.pop(worker, None)

    def _settle(self, worker: Reader, expected: Decision) -> int:
        decision = self.decision(worker)
        if decision is not expected:
            raise ValueError(
                f"Worker {worker}'s push is to {decision.value} at version {self._version}, not to {expected.value}."
            )
        staleness = self._version - self._reads.pop(worker)
        if expected is Decision.APPLY:
            self._version += 1
        return staleness

    def _version_read(self, worker: Reader) -> int:
        try:
            return self._reads[worker]
        except KeyError:
            raise ValueError(f"Worker {worker} holds no parameters that it could answer for.") from None


def _check_version(version: int) -> None:
    if version < 0:
        raise ValueError(f"A version counts updates and cannot be {version}.")
