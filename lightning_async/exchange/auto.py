"""What `gradients_per_update="auto"` makes of step times: whether it is worth not to wait for the slowest rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["LEAST_GAIN", "WARM_UP_STEPS", "Choice", "choose"]

# Steps of each rank in lock step: what is measured. Fewer would do for that; but where gradients change most, at the
# beginning of a training, stale ones do most harm (docs/results.md).
WARM_UP_STEPS = 24
# The first of each segment is not timed, so a part of them is enough.
_NEEDED_PART = 0.75
# The first steps of a process are no measure: memory is new, kernels are chosen, loaders start.
_UNSTEADY = 2
# One round of so many, the slowest, is left out: a hiccup is no slow rank.
_ONE_HICCUP_IN = 10
# Equal ranks whose steps vary by a tenth would gain 1.1. Less than this is not worth stale gradients.
LEAST_GAIN = 1.2


class Choice(NamedTuple):
    """What was chosen for a run, and why.

    Attributes:
        gradients: that make an update, K: the number of ranks, N, if each update waits for all of them.
        gain: how many times as fast the same batches are estimated to be if no rank waits for another.
        step_seconds: mean step of each rank.
        waited_seconds: what each rank had waited for the others by then.
        version: the first one that it holds for.
    """

    gradients: int
    gain: float
    step_seconds: tuple[float, ...]
    waited_seconds: tuple[float, ...] = ()
    version: int = 0

    @property
    def waits_for_all(self) -> bool:
        """Whether each update is made of a gradient of every rank, at the same parameters: DDP."""
        return self.gradients == len(self.step_seconds)


def choose(steps: Sequence[Sequence[float]], update_s: float = 0.0, busy: float = 0.0) -> Choice | None:
    r"""Chooses between lock step, :math:`K = N`, and half of the ranks, :math:`K = \lceil N / 2 \rceil`.

    Lock step takes the mean of the slowest step of each round; without it the ranks' rates add up,
    :math:`\sum_i 1 / \bar s_i`, up to what the holder and the cores can do. Half of the ranks was right, or nearly so,
    wherever ranks were unequal (docs/results.md).

    Args:
        steps: for each rank the seconds of its steps in lock step, without waiting; the i-th of each are one round.
        update_s: seconds that the holder works on a gradient, in lock step.
        busy: part of its cores that the busiest host has used in lock step, at most 1; 0 if that is not known. Ranks
            that share all of its cores cannot be faster together.

    Returns:
        The choice; None if there are too few rounds.

    Examples:
        >>> choose([[1.0] * 24] * 3 + [[4.0] * 24])
        Choice(gradients=2, gain=3.25, step_seconds=(1.0, 1.0, 1.0, 4.0), waited_seconds=(), version=0)
        >>> choose([[1.0] * 24] * 4).waits_for_all, choose([[1.0] * 24] * 3 + [[4.0] * 24], busy=0.9).waits_for_all
        (True, True)
        >>> choose([[1.0] * 5] * 4) is None
        True
    """
    rounds = [*zip(*steps, strict=False)]
    if len(rounds) < _NEEDED_PART * WARM_UP_STEPS:
        return None
    rounds = rounds[_UNSTEADY:]
    rounds.sort(key=max)
    rounds = rounds[: len(rounds) - -(-len(rounds) // _ONE_HICCUP_IN)]
    ranks = len(steps)
    means = [sum(own) / len(rounds) for own in zip(*rounds, strict=True)]
    lock_step_s = sum(map(max, rounds)) / len(rounds) + update_s
    half = -(-ranks // 2)
    # An update is then made for fewer gradients.
    update_s *= ranks / half
    rate = sum(1.0 / max(mean + update_s, 1e-12) for mean in means)
    if update_s > 0.0:
        rate = min(rate, 1.0 / update_s)
    gain = max(1.0, lock_step_s * rate / ranks)
    if busy > 0.0:
        gain = min(gain, max(1.0, 1.0 / busy))
    return Choice(half if gain >= LEAST_GAIN else ranks, gain, tuple(means))
