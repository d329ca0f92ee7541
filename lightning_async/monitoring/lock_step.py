"""What the same batches would take if every step waited for the slowest rank, estimated from a run's step times.

The step times are clock times. Where ranks share cores, a part of them is waiting for a core, which lock step would
have too, but not for the same steps: a rank that waits for the others leaves its core to them. So there is an estimate
only where the most and the least that it may be are close together. What an all-reduce takes is measured, once in a
fit. `benchmarks/lock_step.py` compares the estimate with DDP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_async.monitoring.run_facts import RunFacts

__all__ = ["LockStep", "estimate"]

# The middle of a range up to this wide is at most 15 % off its ends.
_KNOWN_WITHIN = 1.32
# A part of it may be hidden behind the backward pass; ranks that come out of a step have to wake up for it.
_ALL_REDUCES = (0.7, 1.3)
# A host whose cores are used more than this has ranks that wait for a core.
_BUSY = 0.7
# What a rank gets of a core at a time, roughly, where others wait for it.
_SLICE_S = 0.005
# Rank 0 takes a little more than one core, since it serves the others.
_ROOM = 1.15


@dataclass(frozen=True, slots=True)
class LockStep:
    """How many times as long the same batches would take.

    Args:
        low: at least so many times.
        high: at most so many times.
    """

    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether `factor` is within 15 % of whatever is right."""
        return self.high <= _KNOWN_WITHIN * self.low

    @property
    def factor(self) -> float:
        """The middle of the range."""
        return math.sqrt(self.low * self.high)


def estimate(facts: RunFacts) -> LockStep:
    """How many times as long the run's batches would take in lock step.

    Args:
        facts: of a run with updates; every rank made steps.

    Returns:
        A range; from 0 to infinity where it is not known what the ranks used of their hosts, or what an all-reduce
        takes.

    Examples:
        >>> from lightning_async.monitoring.cpu_use import CpuUse
        >>> facts = RunFacts(8, "wait", True, train_seconds=100.0, updates=325, dropped=0,
        ...                  steps=[[1.0], [1.0], [1.0], [4.0]], wait_seconds=[0.0] * 4, parked_seconds=[0.0] * 4,
        ...                  all_reduce_s=0.001, cpu=[CpuUse("a", 8, 1.0)] * 4)
        >>> print(f"{estimate(facts).factor:.2f}")
        3.25
    """
    if not facts.cpu or not facts.all_reduce_s:
        return LockStep(0.0, math.inf)
    hosts: dict[str, list[int]] = {}
    for rank, use in enumerate(facts.cpu):
        hosts.setdefault(use.host, []).append(rank)
    ranges = [_Host(facts, ranks) for ranks in hosts.values()]
    rounds = max(map(len, facts.steps))
    low = sum(max(host.least_s(turn) for host in ranges) for turn in range(rounds)) / rounds
    high = sum(max(host.most_s(turn) for host in ranges) for turn in range(rounds)) / rounds
    scale = facts.updates / facts.ranks / max(facts.train_seconds, 1e-12)
    least_s, most_s = (part * facts.all_reduce_s for part in _ALL_REDUCES)
    return LockStep((low + least_s) * scale, (high + most_s) * scale)


class _Host:
    """What a step of lock step takes on one host."""

    def __init__(self, facts: RunFacts, ranks: Sequence[int]) -> None:
        self._steps = [facts.steps[rank] for rank in ranks]
        uses = [facts.cpu[rank] for rank in ranks]
        self._cores = max(use.cores for use in uses)
        # Cores that a rank takes while it computes.
        demands = [
            use.used * facts.train_seconds / max(facts.train_seconds - facts.wait_seconds[rank], 1e-12)
            for rank, use in zip(ranks, uses, strict=True)
        ]
        # Part of a rank's step in which it computes.
        self._computing = [min(1.0, demand) for demand in demands]
        self._shared = sum(max(1.0, demand) for demand in demands) > _ROOM * self._cores
        self._busy = self._shared and sum(use.used for use in uses) > _BUSY * self._cores
        computed_s = [part * _mean(own) for part, own in zip(self._computing, self._steps, strict=True)]
        # The quickest steps are those that waited least for a core: what they did not compute, the rank slept.
        alone_s = [
            computed + max(0.0, _tenth(own) - computed) for computed, own in zip(computed_s, self._steps, strict=True)
        ]
        self._cores_s = sum(computed_s) / self._cores
        self._least_s = max(*alone_s, self._cores_s)

    def least_s(self, turn: int) -> float:
        """If no rank waited for a core longer than the number of cores makes it."""
        if self._busy:
            return self._least_s
        slowest = max(self._turn(turn))
        return max(slowest, self._cores_s) if self._shared else slowest

    def most_s(self, turn: int) -> float:
        """If ranks wait for cores as long as they did, or, where they began at different times, all at once."""
        taken = self._turn(turn)
        if not self._shared:
            return max(taken)
        if self._busy and self._cores_s < _SLICE_S:
            # How the cores are dealt decides, and nobody knows that.
            return math.inf
        if self._busy:
            return max(*taken, self._cores_s)
        # All compute at the same time, where they came one after the other.
        crowd = max(1.0, len(taken) / self._cores) - 1
        crowded = (step * (1 + part * crowd) for step, part in zip(taken, self._computing, strict=True))
        return max(*crowded, self._cores_s)

    def _turn(self, turn: int) -> list[float]:
        return [own[turn % len(own)] for own in self._steps]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tenth(values: Sequence[float]) -> float:
    """A value that one in ten falls below."""
    return sorted(values)[len(values) // 10]
