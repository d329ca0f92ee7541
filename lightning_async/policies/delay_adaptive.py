"""Updates with old gradients make smaller steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from typing_extensions import override

from lightning_async.policies.base import Arrival, StalenessPolicy

__all__ = ["DelayAdaptiveStep"]


class DelayAdaptiveStep(StalenessPolicy):
    r"""Divides the learning rate of an update whose oldest gradient is older than a threshold by how much older it is.

    With :math:`s` the age of the update's oldest gradient and :math:`\tau_c` the threshold,

    .. math::
        \alpha_t = \begin{cases} \alpha & s \le \tau_c \\ \min(\alpha, \alpha \tau_c / s) & s > \tau_c \end{cases}

    That is the rule of FADAS (`arXiv:2407.18365 <https://arxiv.org/abs/2407.18365>`_), whose second case is
    :math:`\min(\alpha, 1 / s)`, in a form that does not depend on the scale of :math:`\alpha`. The rule of
    Mishchenko et al. (`arXiv:2206.07638 <https://arxiv.org/abs/2206.07638>`_) for SGD takes steps in proportion to
    :math:`\min(1 / N, 1 / s)` with N ranks: the same with ``threshold=N``. At age 0 nothing changes.

    Args:
        threshold: :math:`\tau_c` in versions, at least 1; None takes the average age where all ranks are equally fast,
            (N - 1) / K rounded up and at least 1, with K gradients in an update.

    Raises:
        ValueError: if the threshold is below 1 or not finite.

    Examples:
        >>> policy = DelayAdaptiveStep()
        >>> policy.bind(workers=4, gradients_per_update=1)
        >>> [policy.step_factor([Arrival(0, age, 9, 32), Arrival(1, 0, 9, 32)]) for age in (0, 3, 6)]
        [1.0, 1.0, 0.5]
    """

    def __init__(self, threshold: float | None = None) -> None:
        if threshold is not None and not 1 <= threshold < math.inf:
            raise ValueError(f"The threshold of DelayAdaptiveStep must be a number of at least 1, not {threshold!r}.")
        self.threshold = threshold
        self._threshold = 1.0 if threshold is None else float(threshold)

    @override
    def bind(self, workers: int, gradients_per_update: int) -> None:
        if self.threshold is None:
            self._threshold = float(max(1, -(-(workers - 1) // gradients_per_update)))

    @override
    def check(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.Rprop) or any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(
                "DelayAdaptiveStep scales the learning rate, which the steps of "
                f"{type(optimizer).__name__} do not follow. Take another optimizer, or AgeDamping"
            )

    @override
    def step_factor(self, arrivals: Sequence[Arrival]) -> float:
        oldest = max(arrival.staleness for arrival in arrivals)
        return 1.0 if oldest <= self._threshold else self._threshold / oldest
