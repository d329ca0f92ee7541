"""What another bound would have done: a run's step times played through the barrier's rule.

Pure; plays with the same `StalenessBarrier` that the holder uses.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import Decision

__all__ = ["Replay", "free_bound", "replay"]

# Below this part of the workers' time a barrier counts as free.
FREE_FRACTION = 0.005
# Steps of the slowest rank to be played, and the most updates for their sake.
_ROUNDS, _MOST_UPDATES = 4, 20_000


@dataclass(frozen=True, slots=True)
class Replay:
    """A run as the rule would have shaped it.

    Args:
        seconds: length of the run.
        parked_fraction: part of the workers' time in which the barrier held a gradient or a reader back.
        staleness: staleness -> number of gradients.
    """

    seconds: float
    parked_fraction: float
    staleness: Counter[int]


def replay(
    steps: Sequence[Sequence[float]],
    bound: int | None,
    updates: int,
    exchange_s: float = 0.0,
    gradients_per_update: int = 1,
) -> Replay:
    """Plays ``updates`` gradients: each rank takes its own steps one after the other, round and round.

    Args:
        steps: for each rank the seconds of some of its steps; none may be empty.
        bound: the staleness bound; None bounds nothing.
        updates: gradients to play; those of the last moment are all played.
        exchange_s: seconds that handing in a gradient and getting parameters takes when nothing holds it back.
        gradients_per_update: gradients that make a version.

    Returns:
        What comes of it.

    Examples:
        >>> one_slow = [[1.0], [1.0], [5.0]]
        >>> replay(one_slow, bound=None, updates=110).parked_fraction
        0.0
        >>> replay(one_slow, bound=2, updates=110).parked_fraction > 0.3
        True
        >>> max(replay(one_slow, bound=2, updates=110).staleness)
        2
    """
    barrier = StalenessBarrier(bound, gradients_per_update=gradients_per_update)
    now, sequence, parked_s = 0.0, 0, 0.0
    staleness: Counter[int] = Counter()
    taken = [0] * len(steps)
    arrivals: list[tuple[float, int, int]] = []
    # Who waits, since when: to have a gradient applied, and to read.
    pushing: dict[int, float] = {}
    reading: dict[int, float] = dict.fromkeys(range(len(steps)), 0.0)
    for rank in reading:
        barrier.ask(rank)
    while staleness.total() < updates:
        moved = True
        while moved:
            moved = False
            for rank in [rank for rank in reading if barrier.may_read(rank)]:
                barrier.read(rank)
                parked_s += now - reading.pop(rank)
                step = steps[rank][taken[rank] % len(steps[rank])]
                taken[rank] += 1
                sequence += 1
                heapq.heappush(arrivals, (now + step + exchange_s, sequence, rank))
                moved = True
            for rank in list(pushing):
                if barrier.decision(rank) is Decision.APPLY:
                    staleness[barrier.apply(rank)] += 1
                    parked_s += now - pushing.pop(rank)
                    barrier.ask(rank)
                    reading[rank] = now
                    moved = True
        now, _, rank = heapq.heappop(arrivals)
        pushing[rank] = now
    return Replay(now, parked_s / max(now * len(steps), 1e-12), staleness)


def free_bound(steps: Sequence[Sequence[float]], exchange_s: float = 0.0, gradients_per_update: int = 1) -> int:
    """The smallest bound whose barrier would take less than 0.5 % of the workers' time, estimated by `replay`.

    Examples:
        >>> free_bound([[1.0], [1.0], [1.0]])
        2
        >>> free_bound([[1.0], [1.0], [8.0]]) >= 14, free_bound([[1.0], [1.0], [8.0]], gradients_per_update=3) < 8
        (True, True)
    """
    # So many that the slowest rank comes to hand in some: before that nothing is stale.
    rate = sum(1.0 / max(_mean(own), 1e-12) for own in steps)
    rounds = min(_ROUNDS * rate * max(map(_mean, steps)), _MOST_UPDATES)
    updates = max(1000, 20 * len(steps), int(rounds))
    low, high = 0, max(replay(steps, None, updates, exchange_s, gradients_per_update).staleness)
    while low < high:
        middle = (low + high) // 2
        if replay(steps, middle, updates, exchange_s, gradients_per_update).parked_fraction < FREE_FRACTION:
            high = middle
        else:
            low = middle + 1
    return low


def _mean(own: Sequence[float]) -> float:
    return sum(own) / len(own)
