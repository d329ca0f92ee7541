"""Workers compute where the parameters will be when their gradients arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.momentum_state import (
    family_of,
    group_states,
    move_along_adam,
    refuse_optimizer,
)

__all__ = ["LookAhead"]


class LookAhead(StalenessPolicy):
    r"""Answers a worker with the parameters moved along the momentum by the expected delay d.

    - SGD: :math:`x - \alpha\, d\, m`;
    - Adam and AMSGrad: :math:`x - \alpha_t\, d\, m / (\sqrt{\hat v} / c_t + \epsilon)`, with the bias corrections of
      the last step.

    Nesterov's method with a look-ahead that is as long as the delay is what `arXiv:2505.01099
    <https://arxiv.org/abs/2505.01099>`_ takes for asynchronous pipelines; its use with a parameter server is ours. The
    holder's own parameters, and what is validated and saved, are not moved. Before the first step nothing is, nor with
    one rank, which has no delay.

    Args:
        delay: :math:`d` in versions, at least 0; None takes the average age where all ranks are equally fast,
            (N - 1) / K with N ranks and K gradients in an update.

    Raises:
        ValueError: if the delay is negative or not finite.
    """

    def __init__(self, delay: float | None = None) -> None:
        if delay is not None and not 0 <= delay < math.inf:
            raise ValueError(f"The delay of LookAhead must be a number of at least 0, not {delay!r}.")
        self.delay = delay
        self._delay = 0.0

    @override
    def bind(self, workers: int, gradients_per_update: int) -> None:
        if workers > 1:
            self._delay = (workers - 1) / gradients_per_update if self.delay is None else float(self.delay)

    @override
    def check(self, optimizer: torch.optim.Optimizer) -> None:
        refuse_optimizer("LookAhead", "moves parameters along the", optimizer)

    @override
    def look_ahead(self, out: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        if not self._delay:
            return
        if family_of(optimizer) == "adam":
            for chosen in group_states(optimizer, out, "exp_avg"):
                momenta = [state["exp_avg"] for state in chosen.states]
                move_along_adam(chosen, chosen.others, momenta, self._delay)
            return
        for chosen in group_states(optimizer, out, "momentum_buffer"):
            buffers = [state["momentum_buffer"] for state in chosen.states]
            torch._foreach_add_(chosen.others, buffers, alpha=-chosen.group["lr"] * self._delay)
