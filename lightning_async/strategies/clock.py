"""The counts that all ranks share: versions, steps and batches, as Lightning shows them per rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from typing_extensions import override

from lightning_async.holder.tally import STEPS
from lightning_async.holder.types import Snapshot
from lightning_async.loops.protocols import Clock
from lightning_async.strategies.by_hand import ByHand

__all__ = ["SharedClock", "step_at"]


class SharedClock(Clock):
    """The clock of one fit: gradients over ranks; under manual optimization the steps that Lightning counts.

    N gradients, one a rank, are a step, however many of them make an update: an epoch has as many steps as under DDP.
    Where each gradient is an update, the version counts them; else the ranks report them. By hand, user code may push
    several gradients a step or none, so the ranks report what Lightning has counted on them.

    Args:
        version: tells the version of the parameters that this rank holds.
        world_size: number of ranks N.
        by_hand: what user code does by hand.
        accumulate: tells how many batches make one update under automatic optimization.
    """

    def __init__(
        self, version: Callable[[], int], world_size: int, by_hand: ByHand, accumulate: Callable[[], int]
    ) -> None:
        self._version = version
        self._world_size = world_size
        self._by_hand = by_hand
        self._accumulate = accumulate

    @property
    @override
    def step(self) -> int:
        return self._by_hand.clock if self._by_hand.counts_steps else self._version() // self._world_size

    @property
    @override
    def log_step(self) -> int:
        return self._by_hand.batch_clock if self._by_hand.manual else self.step

    @property
    @override
    def block(self) -> int:
        return self._by_hand.group or 1 if self._by_hand.manual else self._accumulate()

    @property
    @override
    def steps_of_all_ranks(self) -> tuple[int, int]:
        if self._by_hand.counts_steps:
            return self._by_hand.tally.total(STEPS), self._by_hand.steps
        return self._version(), 1

    @property
    @override
    def must_learn(self) -> bool:
        return self._by_hand.must_learn

    @property
    @override
    def has_learned(self) -> bool:
        return self._by_hand.has_learned

    @override
    def restart(self) -> None:
        self._by_hand.restart_count()

    def step_of(self, snapshot: Snapshot) -> int:
        """The step of what a checkpoint consists of."""
        return step_at(snapshot.version, snapshot.counts, self._by_hand.counts_steps, self._world_size)


def step_at(version: int, counts: Sequence[int], counts_steps: bool, world_size: int) -> int:
    """The shared clock's step where the holder has come to a version.

    Args:
        version: the version.
        counts: what all workers have counted by then; empty where nothing but updates is counted.
        counts_steps: whether steps are counted; else each version is one.
        world_size: number of ranks N.

    Examples:
        >>> step_at(12, (), False, 4), step_at(12, (36, 36), True, 4)
        (3, 9)
    """
    return (counts[STEPS] if counts_steps and counts else version) // world_size
