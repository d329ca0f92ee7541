"""Workers, a link and a holder as queues: how many gradients a second, how stale, and what they wait for.

Pure, and without gradients. Every worker computes, sends its gradient over rank 0's link, has it taken by the holder,
gets parameters back over the link, and computes again. Link and holder serve one at a time, in the order of arrival.
Where the holder's shards are spread over the workers' hosts, "the link" is that of the busiest host.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from dataclasses import dataclass
from statistics import mean

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.shards.traffic import busiest_share
from lightning_async.simulation.cluster import ExchangeTimes, play
from lightning_async.simulation.step_times import StepTimes
from lightning_async.transport.int8 import BLOCK

__all__ = ["Costs", "Forecast", "forecast"]

# So many gradients are played, or so many of each worker: at least the second ones are stale as later ones are.
_LEAST_GRADIENTS, _ROUNDS = 4000, 4
# Up to so many workers the barrier itself is played; of more, its effect on the rate alone is estimated.
_PLAYED_WORKERS = 64
# Rounds of lock step of which the mean is taken, and the most steps that are drawn for it.
_LOCK_STEP_ROUNDS, _LOCK_STEP_DRAWS = 200, 200_000
# A rate that is no other.
_FREE = 0.98
# A part of the time that counts as all of it: queues in front are never empty then.
_SATURATED = 0.95


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
        spread: parts of the holder that are spread over the workers' hosts; 1 if it is on rank 0's.

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
    spread: int = 1

    def busy_part(self, workers: int) -> float:
        """For how much of a payload's time it keeps the busiest link busy: 1 if that is rank 0's and has all of it.

        Args:
            workers: their number, each on a host of its own.

        Examples:
            >>> [Costs(spread=shards).busy_part(workers=4) for shards in (1, 2, 4)]
            [1.0, 0.6666666666666666, 0.5]
        """
        if self.spread == 1 or workers == 1:
            return 1.0
        # All but rank 0's own payloads pass rank 0's link where the holder is whole.
        return busiest_share(self.spread, [1] * workers) / busiest_share(1, [1] * workers)

    @classmethod
    def of(
        cls,
        parameters: float,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        wire_dtype: str = "fp32",
        gather_s: float | None = None,
        update_s: float | None = None,
        all_reduce_s: float | None = None,
        shards: int = 1,
    ) -> Costs:
        """From a model's size.

        Args:
            parameters: number of trained parameters.
            bytes_per_s: of rank 0's link, in each direction; None for workers on its host.
            latency_s: of a message.
            wire_dtype: what a value is on the link, both ways; ``"fp32"``, ``"bf16"`` or ``"int8"``.
            gather_s: see `Costs`; estimated if None.
            update_s: see `Costs`; estimated if None.
            all_reduce_s: see `Costs`; estimated if None.
            shards: parts of the holder, each with a core of its own: what is estimated of it is of one part. With a
                link they are on as many hosts as there are.
        """
        held = parameters / shards
        per_value_s = 0.0 if bytes_per_s is None else _WIRE_BYTES[wire_dtype] / bytes_per_s
        gather_s = _MESSAGE_S + (_TELL_S if shards > 1 else 0.0) + _GATHER_S * held if gather_s is None else gather_s
        gather_s += _ROUNDING_S[wire_dtype] * held
        update_s = _UPDATE_S * held if update_s is None else update_s
        if all_reduce_s is None:
            # A ring sends each value twice, in float32; on one host it passes through memory.
            all_reduce_s = parameters * (_REDUCE_S if bytes_per_s is None else 2 * 4 / bytes_per_s)
        size_s = per_value_s * parameters
        spread = 1 if bytes_per_s is None else shards
        return cls(gather_s, _MEAN_S * held, update_s, size_s, size_s, latency_s, all_reduce_s, spread)


# One core of a host with AMSGrad (benchmarks/update.py): of a message, and of a value that is answered with, added up
# where several gradients make an update, or updated.
_MESSAGE_S, _GATHER_S, _MEAN_S, _UPDATE_S = 60e-6, 0.39e-9, 0.42e-9, 0.9e-9
# Bytes of a value with its part of a block's scale, and what the holder needs to round one, and to read one.
_WIRE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / BLOCK}
_ROUNDING_S = {"fp32": 0.0, "bf16": 0.1e-9, "int8": 3.7e-9}
# Of what the parts of a holder tell each other for a gradient (benchmarks/shards.py).
_TELL_S = 200e-6
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


def forecast(steps: StepTimes, costs: Costs, gradients_per_update: int = 1, bound: int | None = None) -> Forecast:
    """Plays a few rounds.

    Args:
        steps: how long the steps of each worker take.
        costs: what a gradient costs besides.
        gradients_per_update: gradients of an update, K.
        bound: the staleness bound in updates; None bounds nothing.

    Examples:
        >>> one_slow = forecast(StepTimes.of([1.0, 1.0, 1.0, 4.0]), Costs())
        >>> round(one_slow.gradients_per_s, 2), round(one_slow.gain, 2)
        (3.25, 3.25)
    """
    workers = steps.workers
    played = _play(steps, costs, gradients_per_update)
    rate, limited_by, staleness, waiting = played.rate, played.limit(), played.staleness, played.waiting
    if bound is not None and max(staleness) > bound:
        if workers <= _PLAYED_WORKERS:
            barrier = StalenessBarrier(bound, gradients_per_update=gradients_per_update)
            cluster, sink = play(steps, barrier, _LEAST_GRADIENTS, ExchangeTimes(pull=played.exchange_s))
            bounded_rate, bounded_staleness = _LEAST_GRADIENTS / cluster.progress.now, sink.staleness
        else:
            # While the slowest computes, no more versions can come than the bound allows.
            slowest_s = max(map(steps.mean, range(workers)))
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
        workers / _lock_step_s(steps, costs),
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


def _play(steps: StepTimes, costs: Costs, gradients_per_update: int) -> _Played:
    """All workers' cycles, one gradient after the other, in the order in which the link gets them."""
    workers = steps.workers
    total = max(_LEAST_GRADIENTS, _ROUNDS * workers)
    # They begin anywhere in their first step. When, whether it is at the holder yet, and whose.
    begun = random.Random(workers)
    events = [(steps.draw(worker, 0) * begun.random(), False, worker) for worker in range(workers)]
    heapq.heapify(events)
    taken, read, since = [1] * workers, [0] * workers, [0.0] * workers
    in_free = holder_free = out_free = 0.0
    holder_s = waited_s = 0.0
    number = sent = 0
    ages: Counter[int] = Counter()
    # The first of each worker are left out: nothing has happened before them.
    warm_up = min(total // 3, 2 * workers)
    counted_from = last = 0.0
    gather_s = costs.gather_s + (costs.mean_s if gradients_per_update > 1 else 0.0)
    # A worker's own link carries the whole of its payload, whatever the busiest one does.
    busy_part = costs.busy_part(workers)
    in_s, out_s = costs.gradient_s * busy_part, costs.parameters_s * busy_part
    by_link = costs.gradient_s > 0 or costs.latency_s > 0
    while number < total:
        now, at_holder, worker = events[0]
        # 1. Computed: a gradient of another host's takes the link.
        if not at_holder:
            since[worker] = now
            if by_link and worker:
                in_free = max(now, in_free) + in_s
                heapq.heapreplace(events, (max(in_free, now + costs.gradient_s) + costs.latency_s, True, worker))
                continue
        # 2. The holder takes it, and answers.
        makes_update = (number + 1) % gradients_per_update == 0
        service_s = gather_s + (costs.update_s if makes_update else 0.0)
        answered = holder_free = max(now, holder_free) + service_s
        if worker:
            out_free = max(holder_free, out_free) + out_s
            answered = max(out_free, holder_free + costs.parameters_s) + costs.latency_s
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
        step = steps.draw(worker, taken[worker])
        taken[worker] += 1
        heapq.heapreplace(events, (answered + step, False, worker))
    counted, seconds = total - warm_up, max(last - counted_from, 1e-12)
    on_link_s = sent * max(in_s, out_s)
    return _Played(
        rate=counted / seconds,
        staleness=ages,
        waiting=min(1.0, waited_s / (seconds * workers)),
        holder_load=min(1.0, holder_s / seconds),
        link_load=min(1.0, on_link_s / seconds),
        exchange_s=waited_s / counted,
    )


def _lock_step_s(steps: StepTimes, costs: Costs) -> float:
    """A step of DDP: the slowest worker's, and an all-reduce."""
    workers = steps.workers
    rounds = max(2, min(_LOCK_STEP_ROUNDS, _LOCK_STEP_DRAWS // workers))
    slowest_s = mean(max(steps.draw(worker, turn) for worker in range(workers)) for turn in range(rounds))
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
