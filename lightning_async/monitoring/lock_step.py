"""What the same batches would take if every step waited for the slowest rank, estimated from a run's step times.

The step times are clock times. Where ranks share cores, a part of them is waiting for a core, which lock step would
have too, but not for the same steps: a rank that waits for the others leaves its core to them. So there is an estimate
only where the most and the least that it may be are close together. `benchmarks/lock_step.py` compares it with DDP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_async.monitoring.run_facts import RunFacts

__all__ = ["LockStep", "estimate"]

# The middle of a range up to this wide is at most 15 % off its ends.
_KNOWN_WITHIN = 1.32
# A host whose cores are used more than this has ranks that wait for a core.
_BUSY = 0.7


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
        A range; from 0 to infinity where it is not known what the ranks used of their hosts.

    Examples:
        >>> from lightning_async.monitoring.cpu_use import CpuUse
        >>> facts = RunFacts(8, "wait", True, train_seconds=100.0, updates=325, dropped=0,
        ...                  steps=[[1.0], [1.0], [1.0], [4.0]], wait_seconds=[0.0] * 4, parked_seconds=[0.0] * 4,
        ...                  cpu=[CpuUse("a", 8, 1.0)] * 4)
        >>> estimate(facts).factor
        3.25
    """
    if not facts.cpu:
        return LockStep(0.0, math.inf)
    hosts: dict[str, list[int]] = {}
    for rank, use in enumerate(facts.cpu):
        hosts.setdefault(use.host, []).append(rank)
    ranges = [_Host(facts, ranks) for ranks in hosts.values()]
    rounds = max(map(len, facts.steps))
    low = sum(max(host.least_s(turn) for host in ranges) for turn in range(rounds)) / rounds
    high = sum(max(host.most_s(turn) for host in ranges) for turn in range(rounds)) / rounds
    # All-reduce may be hidden behind the backward pass, or cost what handing in gradients costs here.
    exchanged_s = (sum(facts.wait_seconds) - sum(facts.parked_seconds)) / max(facts.updates, 1)
    scale = facts.updates / facts.ranks / max(facts.train_seconds, 1e-12)
    return LockStep(low * scale, (high + max(0.0, exchanged_s)) * scale)


class _Host:
    """What a step of lock step takes on one host."""

    def __init__(self, facts: RunFacts, ranks: Sequence[int]) -> None:
        self._steps = [facts.steps[rank] for rank in ranks]
        uses = [facts.cpu[rank] for rank in ranks]
        self._cores = max(use.cores for use in uses)
        total = sum(use.used for use in uses)
        self._shared = len(ranks) > self._cores or total > _BUSY * self._cores
        self._busy = total > _BUSY * self._cores
        # Part of a rank's step in which it computes.
        self._computing = [
            min(1.0, use.used * facts.train_seconds / max(facts.train_seconds - facts.wait_seconds[rank], 1e-12))
            for rank, use in zip(ranks, uses, strict=True)
        ]
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
        if self._busy:
            return max(*taken, self._cores_s)
        # All compute at the same time, where they came one after the other.
        crowd = max(1.0, len(taken) / self._cores) - 1
        return max(step * (1 + part * crowd) for step, part in zip(taken, self._computing, strict=True))

    def _turn(self, turn: int) -> list[float]:
        return [own[turn % len(own)] for own in self._steps]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tenth(values: Sequence[float]) -> float:
    """A value that one in ten falls below."""
    return sorted(values)[len(values) // 10]
