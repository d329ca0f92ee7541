"""What reads and gradients of a virtual cluster come to, and the simplest of it: a barrier without gradients."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import Decision

__all__ = ["BarrierSink", "Delivery", "GradientSink"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A worker's gradient at the holder.

    Args:
        worker: whose it is.
        at: when it came.
        waited: seconds from the end of the worker's step before to the beginning of this one.
        has_gradient: False if the step gave none.
    """

    worker: int
    at: float
    waited: float
    has_gradient: bool = True


class GradientSink(Protocol):
    """What reads and gradients come to: a holder, or its barrier alone."""

    def ask(self, worker: int) -> None:
        """Puts a worker at the end of the queue of readers."""

    def may_read(self, worker: int) -> bool:
        """Whether the worker, the first of the queue, may read now."""

    def read(self, worker: int) -> int:
        """Lets the worker read; returns the version."""

    def push(self, delivery: Delivery, parked: float) -> bool | None:
        """Takes a gradient (True), drops it (False), or lets it wait (None).

        Args:
            delivery: the gradient.
            parked: seconds that it has waited since it was first refused.
        """

    def leave(self, worker: int) -> None:
        """Takes a worker out of the queue, or lets it give back what it has read."""


class BarrierSink(GradientSink):
    """The barrier without gradients.

    Args:
        barrier: decides.

    Attributes:
        staleness: staleness -> number of gradients taken.
        dropped: number of those that were not.
    """

    def __init__(self, barrier: StalenessBarrier) -> None:
        self._barrier = barrier
        self.staleness: Counter[int] = Counter()
        self.dropped = 0

    @override
    def ask(self, worker: int) -> None:
        self._barrier.ask(worker)

    @override
    def may_read(self, worker: int) -> bool:
        return self._barrier.may_read(worker)

    @override
    def read(self, worker: int) -> int:
        return self._barrier.read(worker)

    @override
    def push(self, delivery: Delivery, parked: float) -> bool | None:
        decision = self._barrier.decision(delivery.worker)
        if decision is Decision.WAIT:
            return None
        if decision is Decision.APPLY:
            self.staleness[self._barrier.apply(delivery.worker)] += 1
            return True
        self._barrier.discard(delivery.worker)
        self.dropped += 1
        return False

    @override
    def leave(self, worker: int) -> None:
        self._barrier.leave(worker)
