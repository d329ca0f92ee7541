"""Older gradients count less."""

from __future__ import annotations

import math

from typing_extensions import override

from lightning_async.policies.base import Arrival, StalenessPolicy

__all__ = ["AgeDamping"]


class AgeDamping(StalenessPolicy):
    r"""Multiplies a gradient of age s by :math:`e^{-\alpha s}` before both moments.

    This is the exponential of CGAD, :math:`g \leftarrow \gamma(s)\, e^{-\alpha s} g` (`arXiv:2605.09126
    <https://arxiv.org/abs/2605.09126>`_), without its cosine gate :math:`\gamma`, which silences what is older than a
    cutoff; the paper calls it Adam-Decay. For a cutoff take ``on_stale="drop"``. At age 0 nothing changes.

    Args:
        rate: :math:`\alpha`, at least 0.

    Raises:
        ValueError: if the rate is negative or not finite.

    Examples:
        >>> [round(AgeDamping(0.2).gradient_factor(Arrival(0, age, 9, 32)), 3) for age in (0, 1, 5)]
        [1.0, 0.819, 0.368]
    """

    def __init__(self, rate: float = 0.2) -> None:
        if not 0 <= rate < math.inf:
            raise ValueError(f"The rate of AgeDamping must be a number of at least 0, not {rate!r}.")
        self.rate = rate

    @override
    def gradient_factor(self, arrival: Arrival) -> float:
        return math.exp(-self.rate * arrival.staleness)
