"""A cluster in virtual time: workers that read, compute and hand in gradients, and a holder that serves one at a time.

An event queue; who may read and what becomes of a gradient is decided by the barrier of a real run.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Protocol

from typing_extensions import override

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.policies import Decision
from lightning_async.simulation.step_times import StepTimes, check_seconds

__all__ = ["Arrival", "BarrierSink", "ExchangeTimes", "GradientSink", "Progress", "VirtualCluster", "play"]


@dataclass(frozen=True, slots=True)
class ExchangeTimes:
    """What an exchange with the holder takes, in virtual seconds.

    Args:
        push: a gradient's way to the holder.
        pull: the parameters' way to the worker.
        update: the holder's work for one gradient, in which it does nothing else.

    Raises:
        ValueError: if one is no number of seconds.
    """

    push: float = 0.0
    pull: float = 0.0
    update: float = 0.0

    def __post_init__(self) -> None:
        for name in ("push", "pull", "update"):
            check_seconds(f"{name}_seconds", getattr(self, name))


@dataclass(frozen=True, slots=True)
class Arrival:
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

    def push(self, arrival: Arrival, parked: float) -> bool | None:
        """Takes a gradient (True), drops it (False), or lets it wait (None).

        Args:
            arrival: the gradient.
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
    def push(self, arrival: Arrival, parked: float) -> bool | None:
        decision = self._barrier.decision(arrival.worker)
        if decision is Decision.WAIT:
            return None
        if decision is Decision.APPLY:
            self.staleness[self._barrier.apply(arrival.worker)] += 1
            return True
        self._barrier.discard(arrival.worker)
        self.dropped += 1
        return False

    @override
    def leave(self, worker: int) -> None:
        self._barrier.leave(worker)


@dataclass(slots=True)
class Progress:
    """How far a cluster has come, with nothing under way; JSON can hold it.

    Args:
        now: virtual seconds since the beginning.
        steps: for each worker the number of steps drawn.
        computing: for each worker the seconds that it has computed.
        parked: for each worker the seconds that the barrier has held its gradients back.
        busy: seconds that the holder has worked.
    """

    now: float
    steps: list[int]
    computing: list[float]
    parked: list[float]
    busy: float = 0.0

    @classmethod
    def beginning(cls, workers: int) -> Progress:
        """Where a cluster begins."""
        return cls(0.0, [0] * workers, [0.0] * workers, [0.0] * workers)

    def as_dict(self) -> dict[str, Any]:
        """The same as a dict of copies, for a checkpoint."""
        steps, computing, parked = [*self.steps], [*self.computing], [*self.parked]
        return {"now": self.now, "steps": steps, "computing": computing, "parked": parked, "busy": self.busy}

    def time(self) -> float:
        """Virtual seconds since the beginning."""
        return self.now

    def waiting(self, worker: int) -> float:
        """Part of the time in which a worker did not compute: exchanges, the holder's queue, barrier and stops."""
        return 1.0 - self.computing[worker] / self.now if self.now > 0.0 else 0.0

    @property
    def load(self) -> float:
        """Part of the time in which the holder worked."""
        return self.busy / self.now if self.now > 0.0 else 0.0


@dataclass(slots=True)
class _Worker:
    """Where a worker stands.

    Args:
        ended: when its last step ended, or the stop before its first.
        read_at: when it read last.
        version: what it read.
        first_refused: when its gradient was first held back; None if it was not.
    """

    ended: float = 0.0
    read_at: float = 0.0
    version: int = 0
    first_refused: float | None = None


class VirtualCluster:
    """Workers and a holder in virtual time; its user computes the gradients, or none.

    A stretch begins with `start`: all workers ask to read. `read` goes on to the next read and performs it; its user
    then computes that worker's gradient and says so by `computed`. `settle` ends the stretch: what is under way
    arrives, and nobody reads.

    The holder does one thing at a time. It answers readers first, in the order of their asking, since a worker's next
    read comes with the answer to its push; then it takes gradients in the order of their arrival.

    Args:
        steps: how long each worker's steps take.
        sink: what reads and gradients come to.
        times: what an exchange takes.
        progress: where to go on from; taken over.

    Examples:
        >>> barrier = StalenessBarrier(max_staleness=None)
        >>> cluster = VirtualCluster(StepTimes.of([1.0, 4.5]), BarrierSink(barrier))
        >>> cluster.start()
        >>> order = []
        >>> for _ in range(6):
        ...     order.append(cluster.read())
        ...     cluster.computed()
        >>> order
        [0, 1, 0, 0, 0, 0]
        >>> cluster.settle()
        >>> cluster.progress.now, barrier.version
        (5.0, 6)
    """

    def __init__(
        self,
        steps: StepTimes,
        sink: GradientSink,
        times: ExchangeTimes | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._steps = steps
        self._sink = sink
        self._times = times or ExchangeTimes()
        self.progress = progress or Progress.beginning(steps.workers)
        self._workers = [_Worker() for _ in range(steps.workers)]
        self._numbers = itertools.count()
        # What is to come: an arrival, or a worker that will ask.
        self._events: list[tuple[float, int, Arrival | int]] = []
        self._readers: deque[int] = deque()
        self._arrived: deque[Arrival] = deque()
        self._computing: int | None = None
        # Arrivals that are to come, or have come and not been taken.
        self._under_way = 0

    @property
    def computing(self) -> int | None:
        """The worker that has read, and whose gradient is being computed."""
        return self._computing

    @property
    def version_read(self) -> int:
        """The version that it has read."""
        assert self._computing is not None
        return self._workers[self._computing].version

    def start(self) -> None:
        """Lets every worker ask to read, but for the one whose gradient is being computed."""
        now = self.progress.now
        for number, worker in enumerate(self._workers):
            if number != self._computing:
                worker.ended = now
                self._ask(number)

    def advance(self) -> None:
        """Goes on to the moment when a worker may read, which it does not do yet."""
        while not self._may_read():
            if not self._take_one():
                self._go_on()

    def read(self) -> int:
        """Goes on to the next read; returns the worker that reads."""
        if self._computing is not None:
            raise RuntimeError(f"Worker {self._computing} has read and computes its gradient.")
        self.advance()
        number = self._readers.popleft()
        worker = self._workers[number]
        worker.version, worker.read_at = self._sink.read(number), self.progress.now
        self._computing = number
        return number

    def computed(self, batches: int = 1, has_gradient: bool = True) -> None:
        """Sends the gradient of the worker that has read on its way.

        Args:
            batches: of which it is made; each is a step.
            has_gradient: False if there is none, so that nothing comes to the holder but the worker's next question.
        """
        number, self._computing = self._computing, None
        assert number is not None
        worker, progress = self._workers[number], self.progress
        first = progress.steps[number]
        seconds = sum(self._steps.draw(number, step) for step in range(first, first + batches))
        progress.steps[number] += batches
        progress.computing[number] += seconds
        begins = worker.read_at + self._times.pull
        waited, worker.ended = begins - worker.ended, begins + seconds
        at = worker.ended + self._times.push
        heapq.heappush(self._events, (at, next(self._numbers), Arrival(number, at, waited, has_gradient)))
        self._under_way += 1

    def settle(self) -> None:
        """Lets everything under way arrive, and nobody read; a gradient that is being computed stays that."""
        while self._under_way:
            if not self._take_one():
                self._go_on()
        # Those that would read next have nothing to compute.
        self._note_events()
        while self._readers:
            self._sink.leave(self._readers.popleft())

    def abandon(self) -> None:
        """Lets the worker whose gradient is being computed give back what it has read: there will be none."""
        if self._computing is not None:
            self._sink.leave(self._computing)
            self._computing = None

    def _may_read(self) -> bool:
        self._note_events()
        return bool(self._readers) and self._sink.may_read(self._readers[0])

    def _take_one(self) -> bool:
        """Takes the first gradient that may be taken; False if there is none."""
        self._note_events()
        refused: int | None = None
        for place, arrival in enumerate(self._arrived):
            worker = self._workers[arrival.worker]
            if not arrival.has_gradient:
                self._sink.leave(arrival.worker)
            elif refused is not None and worker.version >= refused:
                # Who read later has a later deadline, and is let through no sooner.
                continue
            else:
                parked = 0.0 if worker.first_refused is None else self.progress.now - worker.first_refused
                taken = self._sink.push(arrival, parked)
                if taken is None:
                    refused = worker.version
                    if worker.first_refused is None:
                        worker.first_refused = self.progress.now
                    continue
                self.progress.parked[arrival.worker] += parked
                worker.first_refused = None
                if taken:
                    self.progress.busy += self._times.update
                    self.progress.now += self._times.update
            del self._arrived[place]
            self._under_way -= 1
            heapq.heappush(self._events, (self.progress.now, next(self._numbers), arrival.worker))
            return True
        return False

    def _go_on(self) -> None:
        """Goes on to the next event."""
        if not self._events:
            raise RuntimeError(
                f"Nothing comes any more in the simulated cluster, and {len(self._arrived)} gradients wait: its "
                "staleness policy lets neither a gradient through nor a worker read."
            )
        self.progress.now = max(self.progress.now, self._events[0][0])

    def _note_events(self) -> None:
        """Brings what has come by now to the holder."""
        while self._events and self._events[0][0] <= self.progress.now:
            event = heapq.heappop(self._events)[2]
            if isinstance(event, Arrival):
                self._arrived.append(event)
            else:
                self._ask(event)

    def _ask(self, worker: int) -> None:
        self._sink.ask(worker)
        self._readers.append(worker)


def play(
    steps: StepTimes, barrier: StalenessBarrier, batches: int, times: ExchangeTimes | None = None
) -> tuple[VirtualCluster, BarrierSink]:
    """Plays so many batches without gradients; they have all been taken or dropped at the end.

    Args:
        steps: how long each worker's steps take.
        barrier: of the cluster; used up.
        batches: their number.
        times: what an exchange takes.

    Examples:
        >>> cluster, sink = play(StepTimes.of([1.0, 1.0]), StalenessBarrier(0, gradients_per_update=2), 10)
        >>> cluster.progress.now, sink.staleness
        (5.0, Counter({0: 10}))
    """
    sink = BarrierSink(barrier)
    cluster = VirtualCluster(steps, sink, times)
    cluster.start()
    for _ in range(batches):
        cluster.read()
        cluster.computed()
    cluster.settle()
    return cluster, sink
