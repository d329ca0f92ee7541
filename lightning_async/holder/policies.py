r"""What keeps the staleness bound: a policy is a class here, its name in `OnStale`, and its entry in `POLICIES`."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from typing import Literal, TypeAlias

from typing_extensions import override

from lightning_async.holder.staleness import admissible, check_bound, is_stale

__all__ = ["POLICIES", "Decision", "DropPolicy", "OnStale", "Reader", "StalenessPolicy", "WaitPolicy"]

# The names of the policies, as the strategy's argument `on_stale` takes them.
OnStale: TypeAlias = Literal["wait", "drop"]

# A worker that holds parameters; the holder names it by rank and slot.
Reader: TypeAlias = Hashable


class Decision(enum.Enum):
    """What becomes of a worker's push if it is decided now."""

    APPLY = "apply"
    WAIT = "wait"
    DROP = "drop"


class StalenessPolicy(ABC):
    r"""Decides who reads and what becomes of a push, so that no applied update is staler than the bound.

    It sees what `StalenessBarrier` keeps, and keeps nothing itself. A policy that lets readers and pushes wait must
    let the oldest reader's push through at any time, or workers would wait for ever.

    Args:
        max_staleness: the bound :math:`\tau` in updates; None bounds nothing.

    Raises:
        ValueError: if the bound is out of range.
    """

    def __init__(self, max_staleness: int | None) -> None:
        check_bound(max_staleness)
        self.max_staleness = max_staleness

    @abstractmethod
    def may_read(self, worker: Reader, reads: Mapping[Reader, int], queue: Iterable[Reader]) -> bool:
        """Whether a worker that is not outstanding may read now.

        Args:
            worker: who would read.
            reads: outstanding worker -> version read.
            queue: the workers that have asked and not read, in the order of their asking.
        """

    @abstractmethod
    def decide(self, worker: Reader, reads: Mapping[Reader, int], version: int) -> Decision:
        """What becomes of an outstanding worker's push now.

        Args:
            worker: whose push it is.
            reads: outstanding worker -> version read; the worker's own is among them.
            version: the holder's version :math:`k` before the update.
        """


class WaitPolicy(StalenessPolicy):
    r"""Holds back a push, or a reader, that would make another worker's update too stale.

    The outstanding set is feasible at the present version at all times: `may_read` requires it of the set with the
    reader, `decide` of the set without the applied update one version later, and leaving only moves the others up. Two
    things follow.

    - No applied update is staler than the bound: feasibility at :math:`k` includes :math:`k \le r_i + \tau` for every
      member.
    - No deadlock: the oldest reader may always be applied. Without it the rest is :math:`r_1, r_2, \dots` at version
      :math:`k + 1`, which needs :math:`(k + 1) + (i - 1) \le r_i + \tau`: that is the invariant. A push waits only for
      workers that read before it, and those wait for fewer still.

    A reader waits only while :math:`\tau + 1` workers are outstanding, whichever reader it is; so serving readers in
    the order of their asking costs nothing and starves nobody.

    Examples:
        >>> policy = WaitPolicy(max_staleness=1)
        >>> policy.decide("a", {"a": 1, "b": 0}, version=1), policy.decide("b", {"a": 1, "b": 0}, version=1)
        (<Decision.WAIT: 'wait'>, <Decision.APPLY: 'apply'>)
    """

    @override
    def may_read(self, worker: Reader, reads: Mapping[Reader, int], queue: Iterable[Reader]) -> bool:
        if self.max_staleness is None:
            return True
        # `readable`, given the invariant: the newcomer's is the latest deadline, and it comes last.
        return len(reads) <= self.max_staleness and next(iter(queue), None) == worker

    @override
    def decide(self, worker: Reader, reads: Mapping[Reader, int], version: int) -> Decision:
        if self.max_staleness is None:
            return Decision.APPLY
        rest = [read for other, read in reads.items() if other != worker]
        return Decision.APPLY if admissible(rest, version, self.max_staleness) else Decision.WAIT


class DropPolicy(StalenessPolicy):
    r"""Lets nobody wait, and discards a push with :math:`k - r > \tau`.

    Examples:
        >>> DropPolicy(max_staleness=1).decide("a", {"a": 0}, version=2)
        <Decision.DROP: 'drop'>
    """

    @override
    def may_read(self, worker: Reader, reads: Mapping[Reader, int], queue: Iterable[Reader]) -> bool:
        return True

    @override
    def decide(self, worker: Reader, reads: Mapping[Reader, int], version: int) -> Decision:
        return Decision.DROP if is_stale(reads[worker], version, self.max_staleness) else Decision.APPLY


POLICIES: dict[str, type[StalenessPolicy]] = {"wait": WaitPolicy, "drop": DropPolicy}
