"""Workers, a link and a holder as queues: how many gradients a second, how stale, and what they wait for.

Pure, and without gradients. Every worker computes, sends its gradient over rank 0's link, has it taken by the holder,
gets parameters back over the link, and computes again. Link and holder serve one at a time, in the order of arrival.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_async.monitoring.replay import replay

__all__ = ["Costs", "Forecast", "Steps", "forecast"]

# So many gradients are played, or so many of each worker: at least the second ones are stale as later ones are.
_LEAST_GRADIENTS, _ROUNDS = 4000, 4
# Up to so many workers the barrier itself is played; of more, its effect on the rate alone is estimated.
_PLAYED_WORKERS = 64
# Rounds of lock step of which the mean is taken, and the most steps that are drawn for it.
_LOCK_STEP_ROUNDS, _LOCK_STEP_DRAWS = 200, 2_000_000
# A rate that is no other.
_FREE = 0.98
# A part of the time that counts as all of it: queues in front are never empty then.
_SATURATED = 0.95

_Floats = npt.NDArray[np.float64]


class Steps:
    """The times of some workers' steps, from which those of any number of workers are made.

    Args:
        seconds: for each known worker the seconds of some of its steps.
        jitter: relative standard deviation that each step varies by in addition.
        seed: of the variation.

    Raises:
        ValueError: if a step takes no time, or there is none.

    Examples:
        >>> steps = Steps([[1.0], [4.0]])
        >>> [steps.mean(worker, workers=4) for worker in range(4)]
        [1.0, 4.0, 1.0, 4.0]
    """

    def __init__(self, seconds: Sequence[Sequence[float]], jitter: float = 0.0, seed: int = 0) -> None:
        if not seconds or not all(seconds):
            raise ValueError("there are no step times")
        if not all(0 < step < math.inf for own in seconds for step in own):
            raise ValueError("each step takes a positive number of seconds")
        if jitter < 0:
            raise ValueError(f"the jitter is {jitter} and must not be negative")
        self._known = [np.asarray(own, dtype=np.float64) for own in seconds]
        self._jitter = jitter
        self._seed = seed

    @property
    def known(self) -> int:
        """How many workers' steps are given."""
        return len(self._known)

    def mean(self, worker: int, workers: int) -> float:
        """Mean seconds of a step of one of ``workers``."""
        return float(self._of(worker, workers).mean())

    def table(self, workers: int, steps: int) -> _Floats:
        """Steps of ``workers`` workers: shape ``(workers, steps)``, seconds."""
        generator = np.random.default_rng([self._seed, workers])
        drawn = np.empty((workers, steps))
        for known in range(min(self.known, workers)):
            mine = self._of(known, workers)
            rows = range(known, workers, self.known)
            # From anywhere in the recorded steps, so that workers of one kind do not move together.
            start = generator.integers(len(mine), size=(len(rows), 1))
            drawn[known :: self.known] = mine[(start + np.arange(steps)) % len(mine)]
        if self._jitter:
            spread = math.sqrt(math.log1p(self._jitter**2))
            drawn *= generator.lognormal(-(spread**2) / 2, spread, drawn.shape)
        return drawn

    def _of(self, worker: int, workers: int) -> _Floats:
        # Of few workers some from each end, and not the first ones only.
        place = worker % self.known if workers >= self.known else worker * self.known // workers
        return self._known[place]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a gradient costs besides its computation.

    Args:
        gather_s: seconds of the holder for each gradient, its answer included.
        mean_s: further seconds for each, where several make an update.
        update_s: further seconds for each update.
        gradient_s: seconds that a gradient takes on rank 0's link.
        parameters_s: seconds that an answer takes there; the link carries both ways at once.
        latency_s: seconds for a message to get there, however short.
        all_reduce_s: seconds of lock step's exchange, but for its latency.

    Examples:
        >>> one_gigabit = Costs.of(parameters=1_000_000, bytes_per_s=125e6)
        >>> one_gigabit.gradient_s
        0.032
    """

    gather_s: float = 0.0
    mean_s: float = 0.0
    update_s: float = 0.0
    gradient_s: float = 0.0
    parameters_s: float = 0.0
    latency_s: float = 0.0
    all_reduce_s: float = 0.0

    @classmethod
    def of(
        cls,
        parameters: float,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        wire_bytes: int = 4,
        gather_s: float | None = None,
        update_s: float | None = None,
        all_reduce_s: float | None = None,
    ) -> Costs:
        """From a model's size.

        Args:
            parameters: number of trained parameters.
            bytes_per_s: of rank 0's link, in each direction; None for workers on its host.
            latency_s: of a message.
            wire_bytes: bytes of a value on the link.
            gather_s: see `Costs`; estimated if None.
            update_s: see `Costs`; estimated if None.
            all_reduce_s: see `Costs`; estimated if None.
        """
        per_value_s = 0.0 if bytes_per_s is None else wire_bytes / bytes_per_s
        gather_s = _MESSAGE_S + _GATHER_S * parameters if gather_s is None else gather_s
        update_s = _UPDATE_S * parameters if update_s is None else update_s
        if all_reduce_s is None:
            # A ring sends each value twice, in float32; on one host it passes through memory.
            all_reduce_s = parameters * (_REDUCE_S if bytes_per_s is None else 2 * 4 / bytes_per_s)
        size_s = per_value_s * parameters
        return cls(gather_s, _MEAN_S * parameters, update_s, size_s, size_s, latency_s, all_reduce_s)


# One core of a host with AMSGrad (benchmarks/update.py): of a message, and of a value that is answered with, added up
# where several gradients make an update, or updated.
_MESSAGE_S, _GATHER_S, _MEAN_S, _UPDATE_S = 60e-6, 0.39e-9, 0.42e-9, 0.9e-9
# Of a value in an all-reduce over Gloo on one host (benchmarks/lock_step.py).
_REDUCE_S = 3e-9


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a number of workers would do.

    Args:
        workers: their number N.
        gradients_per_s: gradients taken a second.
        limited_by: ``"workers"``, ``"holder"``, ``"link"`` or ``"bound"``.
        mean_staleness: in versions, as the next two.
        p95_staleness: one in twenty is staler.
        max_staleness: the greatest.
        waiting: part of the workers' time that is not computing.
        holder_load: part of the time that the holder is busy.
        link_load: part of the time that the busier direction of the link is.
        lock_step_per_s: gradients a second under DDP.
    """

    workers: int
    gradients_per_s: float
    limited_by: str
    mean_staleness: float
    p95_staleness: int
    max_staleness: int
    waiting: float
    holder_load: float
    link_load: float
    lock_step_per_s: float

    @property
    def gain(self) -> float:
        """How many times DDP's rate."""
        return self.gradients_per_s / self.lock_step_per_s


def forecast(
    steps: Steps, workers: int, costs: Costs, gradients_per_update: int = 1, bound: int | None = None
) -> Forecast:
    """Plays a few rounds.

    Args:
        steps: how long steps take.
        workers: how many workers, N.
        costs: what a gradient costs besides.
        gradients_per_update: gradients of an update, K.
        bound: the staleness bound in updates; None bounds nothing.

    Examples:
        >>> one_slow = forecast(Steps([[1.0], [1.0], [1.0], [4.0]]), 4, Costs())
        >>> round(one_slow.gradients_per_s, 2), round(one_slow.gain, 2)
        (3.25, 3.25)
    """
    played = _play(steps, workers, costs, gradients_per_update)
    rate, limited_by, staleness, waiting = played.rate, played.limit(), played.staleness, played.waiting
    if bound is not None and max(staleness) > bound:
        if workers <= _PLAYED_WORKERS:
            table = steps.table(workers, max(20, _LEAST_GRADIENTS // workers))
            exchange_s = played.exchange_s
            bounded = replay(table.tolist(), bound, table.size // 2, exchange_s, gradients_per_update)
            bounded_rate, bounded_staleness = bounded.staleness.total() / bounded.seconds, bounded.staleness
        else:
            # While the slowest computes, no more versions can come than the bound allows.
            slowest_s = max(steps.mean(worker, workers) for worker in range(min(steps.known, workers)))
            bounded_rate = (bound + 1) * gradients_per_update / (slowest_s + played.exchange_s)
            bounded_staleness = Counter({min(age, bound): count for age, count in staleness.items()})
        if bounded_rate < _FREE * rate:
            waiting += (1 - waiting) * (1 - bounded_rate / rate)
            rate, limited_by = bounded_rate, "bound"
        staleness = bounded_staleness
    ages = sorted(staleness)
    total = sum(staleness.values())
    slow_down = rate / played.rate
    return Forecast(
        workers,
        rate,
        limited_by,
        sum(age * count for age, count in staleness.items()) / total,
        _quantile(staleness, 0.95),
        ages[-1],
        waiting,
        played.holder_load * slow_down,
        played.link_load * slow_down,
        workers / _lock_step_s(steps, workers, costs),
    )


@dataclass(frozen=True, slots=True)
class _Played:
    rate: float
    staleness: Counter[int]
    waiting: float
    holder_load: float
    link_load: float
    exchange_s: float

    def limit(self) -> str:
        if self.holder_load > _SATURATED and self.holder_load >= self.link_load:
            return "holder"
        return "link" if self.link_load > _SATURATED else "workers"


def _play(steps: Steps, workers: int, costs: Costs, gradients_per_update: int) -> _Played:
    """All workers' cycles, one gradient after the other, in the order in which the link gets them."""
    total = max(_LEAST_GRADIENTS, _ROUNDS * workers)
    columns = min(1001, max(_ROUNDS, 2 * total // workers))
    table = steps.table(workers, columns)
    # They begin anywhere in their first step.
    begun = np.random.default_rng(workers).random(workers)
    # When, whether it is at the holder yet, and whose.
    events = [
        (float(first * part), False, worker)
        for worker, (first, part) in enumerate(zip(table[:, 0], begun, strict=True))
    ]
    heapq.heapify(events)
    draws: list[list[float]] = table.tolist()
    taken, read, since = [1] * workers, [0] * workers, [0.0] * workers
    in_free = holder_free = out_free = 0.0
    holder_s = waited_s = 0.0
    number = sent = 0
    ages: Counter[int] = Counter()
    # The first of each worker are left out: nothing has happened before them.
    warm_up = min(total // 3, 2 * workers)
    counted_from = last = 0.0
    gather_s = costs.gather_s + (costs.mean_s if gradients_per_update > 1 else 0.0)
    by_link = costs.gradient_s > 0 or costs.latency_s > 0
    while number < total:
        now, at_holder, worker = events[0]
        # 1. Computed: a gradient of another host's takes the link.
        if not at_holder:
            since[worker] = now
            if by_link and worker:
                in_free = max(now, in_free) + costs.gradient_s
                heapq.heapreplace(events, (in_free + costs.latency_s, True, worker))
                continue
        # 2. The holder takes it, and answers.
        makes_update = (number + 1) % gradients_per_update == 0
        service_s = gather_s + (costs.update_s if makes_update else 0.0)
        answered = holder_free = max(now, holder_free) + service_s
        if worker:
            out_free = max(holder_free, out_free) + costs.parameters_s
            answered = out_free + costs.latency_s
        if number >= warm_up:
            ages[number // gradients_per_update - read[worker]] += 1
            holder_s += service_s
            waited_s += answered - since[worker]
            sent += worker != 0
        else:
            counted_from = holder_free
        last = holder_free
        number += 1
        read[worker] = number // gradients_per_update
        # 3. It computes again.
        step = draws[worker][taken[worker] % columns]
        taken[worker] += 1
        heapq.heapreplace(events, (answered + step, False, worker))
    counted, seconds = total - warm_up, max(last - counted_from, 1e-12)
    on_link_s = sent * max(costs.gradient_s, costs.parameters_s)
    return _Played(
        rate=counted / seconds,
        staleness=ages,
        waiting=min(1.0, waited_s / (seconds * workers)),
        holder_load=min(1.0, holder_s / seconds),
        link_load=min(1.0, on_link_s / seconds),
        exchange_s=waited_s / counted,
    )


def _lock_step_s(steps: Steps, workers: int, costs: Costs) -> float:
    """A step of DDP: the slowest worker's, and an all-reduce."""
    rounds = max(2, min(_LOCK_STEP_ROUNDS, _LOCK_STEP_DRAWS // workers))
    slowest_s = float(steps.table(workers, rounds).max(axis=0).mean())
    if workers == 1:
        return slowest_s
    hops = 2 * math.ceil(math.log2(workers))
    return slowest_s + costs.all_reduce_s * (workers - 1) / workers + hops * costs.latency_s


def _quantile(counts: Counter[int], part: float) -> int:
    wanted, seen = part * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return max(counts)
