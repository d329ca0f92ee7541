"""A cluster in virtual time: workers that read, compute and hand in gradients, and a holder that serves one at a time.

An event queue; who may read and what becomes of a gradient is decided by the barrier of a real run.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.simulation.sink import BarrierSink, Delivery, GradientSink
from lightning_async.simulation.step_times import StepTimes, check_seconds

__all__ = ["ExchangeTimes", "Progress", "VirtualCluster", "play"]


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

    The holder does one thing at a time, as the server of a real run: the answer to a push is the next read, in one go
    where the barrier lets it. What was held back is tried again after each change, in the order of the pushes' arrival.

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
        # Arrivals that are to come, by time, and the requests that the holder has: gradients, and workers that wait to
        # read. Each has its number, in the order of arrival.
        self._to_come: list[tuple[float, int, Delivery]] = []
        self._arrived: deque[tuple[int, Delivery]] = deque()
        self._readers: deque[tuple[int, int]] = deque()
        # Who reads next, and who has read and computes.
        self._next: int | None = None
        self._computing: int | None = None

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
        for number, worker in enumerate(self._workers):
            if number != self._computing:
                worker.ended = self.progress.now
                self._sink.ask(number)
                self._readers.append((next(self._numbers), number))

    def advance(self) -> None:
        """Goes on to the moment when a worker may read, which it does not do yet."""
        while self._next is None:
            if not self._serve_one(may_read=True):
                self._go_on()

    def read(self) -> int:
        """Goes on to the next read; returns the worker that reads."""
        if self._computing is not None:
            raise RuntimeError(f"Worker {self._computing} has read and computes its gradient.")
        self.advance()
        number, self._next = self._next, None
        assert number is not None
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
        heapq.heappush(self._to_come, (at, next(self._numbers), Delivery(number, at, waited, has_gradient)))

    def settle(self) -> None:
        """Lets everything under way arrive, and nobody read; a gradient that is being computed stays that."""
        waiting = [] if self._next is None else [self._next]
        self._next = None
        while self._arrived or self._to_come:
            if not self._serve_one(may_read=False):
                self._go_on()
        # Those that would read next have nothing to compute.
        waiting += [worker for _, worker in self._readers]
        self._readers.clear()
        for worker in waiting:
            self._sink.leave(worker)

    def abandon(self) -> None:
        """Lets the worker whose gradient is being computed give back what it has read: there will be none."""
        if self._computing is not None:
            self._sink.leave(self._computing)
            self._computing = None

    def _serve_one(self, may_read: bool) -> bool:
        """Serves the first request that can be served; False if there is none.

        Args:
            may_read: whether anyone may read.
        """
        while self._to_come and self._to_come[0][0] <= self.progress.now:
            self._arrived.append((next(self._numbers), heapq.heappop(self._to_come)[-1]))
        reader: int | None = None
        if may_read and self._readers and self._sink.may_read(self._readers[0][1]):
            reader = self._readers[0][0]
        refused: int | None = None
        for place, (number, delivery) in enumerate(self._arrived):
            if reader is not None and reader < number:
                break
            version = self._workers[delivery.worker].version
            # Who read later has a later deadline, and is let through no sooner.
            if delivery.has_gradient and refused is not None and version >= refused:
                continue
            if self._take(delivery):
                del self._arrived[place]
                self._answer(number, delivery.worker, may_read)
                return True
            refused = version
        if reader is not None:
            self._next = self._readers.popleft()[1]
        return reader is not None

    def _take(self, delivery: Delivery) -> bool:
        """Offers what has arrived to the sink; False if it has to wait."""
        if not delivery.has_gradient:
            self._sink.leave(delivery.worker)
            return True
        worker, progress = self._workers[delivery.worker], self.progress
        parked = 0.0 if worker.first_refused is None else progress.now - worker.first_refused
        taken = self._sink.push(delivery, parked)
        if taken is None:
            if worker.first_refused is None:
                worker.first_refused = progress.now
            return False
        progress.parked[delivery.worker] += parked
        worker.first_refused = None
        if taken:
            progress.busy += self._times.update
            progress.now += self._times.update
        return True

    def _answer(self, number: int, worker: int, may_read: bool) -> None:
        """Lets a worker whose push was served read, or puts it with its request's number to those that wait."""
        self._sink.ask(worker)
        if may_read and self._sink.may_read(worker):
            self._next = worker
        else:
            self._readers.append((number, worker))

    def _go_on(self) -> None:
        """Goes on to the next arrival."""
        if not self._to_come:
            raise RuntimeError(
                f"Nothing comes any more in the simulated cluster, and {len(self._arrived)} gradients wait: its "
                "staleness policy lets neither a gradient through nor a worker read."
            )
        self.progress.now = max(self.progress.now, self._to_come[0][0])


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
