"""The staleness barrier: who holds parameters of which version, and who waits; no thread, no lock, no tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

from lightning_async.holder.barrier_policies import POLICIES, Decision, OnStale, Reader

__all__ = ["StalenessBarrier"]


class StalenessBarrier:
    r"""Who holds parameters of which version, and who waits to read; bookkeeping without threads.

    Owns the version counter, the outstanding workers and the queue of readers. It never waits: the holder calls it
    under its own lock, parks those that are told to wait, and asks again after every `apply`, `discard` and `leave`.
    What it answers is the policy's decision (`barrier_policies.py`).

    Args:
        max_staleness: the bound :math:`\tau` in updates; None bounds nothing.
        on_stale: whether the bound is kept by waiting or by dropping.
        version: the version to start from.
        gradients_per_update: gradients that make a version, :math:`K`.

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

    def __init__(
        self,
        max_staleness: int | None,
        on_stale: OnStale = "wait",
        version: int = 0,
        gradients_per_update: int = 1,
    ) -> None:
        _check_version(version)
        self._set_rules(max_staleness, on_stale, gradients_per_update)
        self._version = version
        self._filled = 0
        self._reads: dict[Reader, int] = {}
        # A dict, as the ordered set that the standard library lacks.
        self._readers: dict[Reader, None] = {}

    @property
    def version(self) -> int:
        """Number of updates made so far. Settable (to load a checkpoint) while nobody is outstanding."""
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        _check_version(version)
        self._check_nobody_holds("The version")
        self._version = version

    @property
    def filled(self) -> int:
        """Number of gradients that the next version has already, below ``gradients_per_update``.

        Settable (to load a checkpoint) while nobody is outstanding.
        """
        return self._filled

    @filled.setter
    def filled(self, filled: int) -> None:
        if not 0 <= filled < self.gradients_per_update:
            raise ValueError(f"{self.gradients_per_update} gradients make a version, so {filled} cannot wait for more.")
        self._check_nobody_holds("The number of gradients")
        self._filled = filled

    def complete(self) -> None:
        """Makes a version of the gradients that there are, while nobody is outstanding: no more will come.

        Raises:
            ValueError: if there are none.
        """
        if not self._filled:
            raise ValueError("No gradient waits for more, so there is no version to complete.")
        self._check_nobody_holds("A version")
        self._version, self._filled = self._version + 1, 0

    def adjust(self, max_staleness: int | None, on_stale: OnStale, gradients_per_update: int) -> None:
        """Goes on by other rules, at the border of a version and while nobody is outstanding.

        So no gradient is under way that another bound was promised to, and none waits for a number of others that is
        no longer right.

        Args:
            max_staleness: the bound from here on.
            on_stale: what keeps it.
            gradients_per_update: gradients that make a version.

        Raises:
            ValueError: if an argument is out of range, a worker holds parameters, or gradients wait for more.
        """
        self._check_nobody_holds("The rules")
        if self._filled:
            raise ValueError(f"The rules cannot be set while {self._filled} gradients wait for more.")
        self._set_rules(max_staleness, on_stale, gradients_per_update)

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
            False for a worker that is outstanding; for others what the policy says.
        """
        return worker not in self._reads and self._policy.may_read(worker, self._reads, self._readers, self._filled)

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

        Raises:
            ValueError: if the worker is not outstanding.
        """
        self._version_read(worker)
        return self._policy.decide(worker, self._reads, self._version, self._filled)

    def apply(self, worker: Reader) -> int:
        """Takes a worker's gradient, the last of a version or one of it; the worker is outstanding no more.

        Args:
            worker: whose gradient is taken.

        Returns:
            Its staleness: the version before it, less the version read.

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

    def in_a_row(self, workers: Iterable[Reader]) -> int:
        """How many workers' gradients would be applied one after the other, if each reads again after its own.

        As many are applied, too, if some of them do not read: nobody's gradient waits for a worker that holds nothing.

        Args:
            workers: in the order of their pushes; outstanding, each once.
        """
        rehearsal = copy.copy(self)
        rehearsal._reads, rehearsal._readers = dict(self._reads), dict(self._readers)
        number = 0
        for worker in workers:
            if rehearsal.decision(worker) is not Decision.APPLY:
                break
            rehearsal.apply(worker)
            rehearsal.ask(worker)
            if rehearsal.may_read(worker):
                rehearsal.read(worker)
            number += 1
        return number

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
            made, self._filled = divmod(self._filled + 1, self.gradients_per_update)
            self._version += made
        return staleness

    def _set_rules(self, max_staleness: int | None, on_stale: OnStale, gradients_per_update: int) -> None:
        if on_stale not in POLICIES:
            raise ValueError(f"on_stale must be one of {', '.join(map(repr, POLICIES))}, not {on_stale!r}.")
        self._policy = POLICIES[on_stale](max_staleness, gradients_per_update)
        self.max_staleness = max_staleness
        self.on_stale: OnStale = on_stale
        self.gradients_per_update = gradients_per_update

    def _check_nobody_holds(self, what: str) -> None:
        if self._reads:
            raise ValueError(f"{what} cannot be set while workers {[*self._reads]} hold parameters.")

    def _version_read(self, worker: Reader) -> int:
        try:
            return self._reads[worker]
        except KeyError:
            raise ValueError(f"Worker {worker} holds no parameters that it could answer for.") from None


def _check_version(version: int) -> None:
    if version < 0:
        raise ValueError(f"A version counts updates and cannot be {version}.")
