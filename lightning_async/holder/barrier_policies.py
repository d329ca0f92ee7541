r"""What keeps the staleness bound: a policy is a class here, its name in `OnStale`, and its entry in `POLICIES`."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from typing import Literal, TypeAlias

from typing_extensions import override

from lightning_async.holder.staleness import admissible, check_bound, is_stale

__all__ = ["POLICIES", "BarrierPolicy", "Decision", "DropPolicy", "OnStale", "Reader", "WaitPolicy"]

# The names of the policies, as the strategy's argument `on_stale` takes them.
OnStale: TypeAlias = Literal["wait", "drop"]

# A worker that holds parameters; the holder names it by rank and slot.
Reader: TypeAlias = Hashable


class Decision(enum.Enum):
    """What becomes of a worker's push if it is decided now."""

    APPLY = "apply"
    WAIT = "wait"
    DROP = "drop"


class BarrierPolicy(ABC):
    r"""Decides who reads and what becomes of a push, so that no applied update is staler than the bound.

    It sees what `StalenessBarrier` keeps, and keeps nothing itself. A policy that lets readers and pushes wait must
    let the oldest reader's push through at any time, or workers would wait for ever.

    Args:
        max_staleness: the bound :math:`\tau` in updates; None bounds nothing.
        gradients_per_update: gradients that make an update, :math:`K`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, max_staleness: int | None, gradients_per_update: int = 1) -> None:
        check_bound(max_staleness)
        if gradients_per_update < 1:
            raise ValueError(f"gradients_per_update must be at least 1, not {gradients_per_update}.")
        self.max_staleness = max_staleness
        self.gradients_per_update = gradients_per_update

    @abstractmethod
    def may_read(self, worker: Reader, reads: Mapping[Reader, int], queue: Iterable[Reader], filled: int = 0) -> bool:
        """Whether a worker that is not outstanding may read now.

        Args:
            worker: who would read.
            reads: outstanding worker -> version read.
            queue: the workers that have asked and not read, in the order of their asking.
            filled: gradients that the present version has already, :math:`w`.
        """

    @abstractmethod
    def decide(self, worker: Reader, reads: Mapping[Reader, int], version: int, filled: int = 0) -> Decision:
        """What becomes of an outstanding worker's push now.

        Args:
            worker: whose push it is.
            reads: outstanding worker -> version read; the worker's own is among them.
            version: the holder's version :math:`k` before the update.
            filled: gradients that it has already, :math:`w`.
        """


class WaitPolicy(BarrierPolicy):
    r"""Holds back a push, or a reader, that would make another worker's update too stale.

    The outstanding set is feasible at the present version at all times: `may_read` requires it of the set with the
    reader, `decide` of the set without the applied update one version later, and leaving only moves the others up. Two
    things follow.

    - No applied update is staler than the bound: feasibility at :math:`k` includes :math:`k \le r_i + \tau` for every
      member.
    - No deadlock: the oldest reader may always be applied. It takes the next place, and the rest
      :math:`r_1, r_2, \dots` keep the places that they had in the invariant. A push waits only for workers that read
      before it, and those wait for fewer still.

    A reader waits only while as many workers are outstanding as there are places left, :math:`(\tau + 1) K - w`,
    whichever reader it is; so serving readers in the order of their asking costs nothing and starves nobody.

    Examples:
        >>> policy = WaitPolicy(max_staleness=1)
        >>> policy.decide("a", {"a": 1, "b": 0}, version=1), policy.decide("b", {"a": 1, "b": 0}, version=1)
        (<Decision.WAIT: 'wait'>, <Decision.APPLY: 'apply'>)
    """

    @override
    def may_read(self, worker: Reader, reads: Mapping[Reader, int], queue: Iterable[Reader], filled: int = 0) -> bool:
        if self.max_staleness is None:
            return True
        # `readable`, given the invariant: the newcomer's is the latest deadline, and it comes last.
        places = (self.max_staleness + 1) * self.gradients_per_update - filled
        return len(reads) < places and next(iter(queue), None) == worker

    @override
    def decide(self, worker: Reader, reads: Mapping[Reader, int], version: int, filled: int = 0) -> Decision:
        if self.max_staleness is None:
            return Decision.APPLY
        rest = [read for other, read in reads.items() if other != worker]
        in_time = admissible(rest, version, self.max_staleness, self.gradients_per_update, filled)
        return Decision.APPLY if in_time else Decision.WAIT


class DropPolicy(BarrierPolicy):
    r"""Lets nobody wait, and discards a push with :math:`k - r > \tau`.

    Examples:
        >>> DropPolicy(max_staleness=1).decide("a", {"a": 0}, version=2)
        <Decision.DROP: 'drop'>
    """

    @override
    def may_read(self, worker: Reader, reads: Mapping[Reader, int], queue: Iterable[Reader], filled: int = 0) -> bool:
        return True

    @override
    def decide(self, worker: Reader, reads: Mapping[Reader, int], version: int, filled: int = 0) -> Decision:
        return Decision.DROP if is_stale(reads[worker], version, self.max_staleness) else Decision.APPLY


POLICIES: dict[str, type[BarrierPolicy]] = {"wait": WaitPolicy, "drop": DropPolicy}
