"""Every rank weighs the same, however often it comes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from lightning_async.policies.base import Arrival, StalenessPolicy

__all__ = ["RescaledByFrequency"]


class RescaledByFrequency(StalenessPolicy):
    r"""Multiplies a rank's gradient by the inverse of how often that rank comes.

    Fast ranks make more updates, so without it training minimizes a mean of the ranks' objectives that is weighted by
    their speed. That matters where ranks have data of their own (streams, or loaders that cannot be shared); where
    they draw from one order, the gradients of all ranks estimate the same objective, and this only adds noise.

    With :math:`c_i` gradients of rank i so far, this one included, of :math:`c` in all and N ranks,

    .. math:: g \leftarrow \min(b, \max(1 / b, c / (N c_i)))\, g

    Rescaled ASGD (`arXiv:2605.13434 <https://arxiv.org/abs/2605.13434>`_) scales each rank's step size in proportion
    to the time of its steps, which is this for SGD, with counts in the place of known times and a bound b. With
    Adam and AMSGrad it is ours: the first moment is a mean in which each rank weighs the same. Where all ranks
    come equally often, the factor is 1 at the end of each round; within the first it rises from 1 / N to 1.

    Args:
        bound: :math:`b`, the largest factor, and the inverse of the smallest; at least 1.

    Raises:
        ValueError: if the bound is below 1 or not finite.

    Examples:
        >>> policy = RescaledByFrequency()
        >>> policy.bind(workers=2, gradients_per_update=1)
        >>> [policy.gradient_factor(Arrival(rank, 0, 9, 32)) for rank in (0, 1, 0, 0)]
        [0.5, 1.0, 0.75, 0.6666666666666666]
        >>> policy.state_dict()
        {'counts': [3, 1]}
    """

    def __init__(self, bound: float = 4.0) -> None:
        if not 1 <= bound < math.inf:
            raise ValueError(f"The bound of RescaledByFrequency must be a number of at least 1, not {bound!r}.")
        self.bound = bound
        self._counts: list[int] = []

    @override
    def bind(self, workers: int, gradients_per_update: int) -> None:
        self._counts = [0] * workers

    @override
    def gradient_factor(self, arrival: Arrival) -> float:
        counts = self._counts
        counts[arrival.worker] += 1
        factor = sum(counts) / (len(counts) * counts[arrival.worker])
        return min(self.bound, max(1.0 / self.bound, factor))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"counts": [*self._counts]}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # With another number of ranks they are other ranks: their counts begin anew.
        if len(state["counts"]) == len(self._counts):
            self._counts = [*state["counts"]]
