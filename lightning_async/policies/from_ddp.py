"""A DDP run's learning rate and momentum, taken over as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.policies.base import Arrival
from lightning_async.policies.look_ahead import LookAhead
from lightning_async.policies.momentum_state import family_of

__all__ = ["FromDDP", "ddp_step_factor"]

# Their steps do not grow with the gradient: they divide by its root mean square, or take its sign.
_ADAPTIVE = ("Adam", "AMSGrad", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta", "Lion", "Lamb")


def ddp_step_factor(optimizer: torch.optim.Optimizer, workers: int, gradients_per_update: int) -> float:
    r"""What a learning rate that was tuned for DDP is multiplied by, where an update averages fewer gradients.

    With :math:`\kappa = K / N` it is :math:`\sqrt\kappa` for adaptive optimizers (square root scaling rule,
    `arXiv:2205.10287 <https://arxiv.org/abs/2205.10287>`_), :math:`\kappa` for others (linear scaling rule,
    `arXiv:1706.02677 <https://arxiv.org/abs/1706.02677>`_), and 1 where :math:`K \ge N`.

    Args:
        optimizer: the module's.
        workers: number of ranks, N.
        gradients_per_update: gradients that make an update, K.

    Examples:
        >>> weights = [torch.nn.Parameter(torch.ones(1))]
        >>> round(ddp_step_factor(torch.optim.AdamW(weights), 4, 2), 3)
        0.707
        >>> ddp_step_factor(torch.optim.SGD(weights, 0.1), 4, 2), ddp_step_factor(torch.optim.SGD(weights, 0.1), 4, 4)
        (0.5, 1.0)
    """
    part = min(1.0, gradients_per_update / workers)
    adaptive = family_of(optimizer) == "adam" or type(optimizer).__name__ in _ADAPTIVE
    return part**0.5 if adaptive else part


class FromDDP(LookAhead):
    r"""Takes over the learning rate and the momentum of a DDP run: `LookAhead`, and a step as `ddp_step_factor` says.

    What staleness spoils is momentum: it is the look-ahead that lets β1 stay as it is (docs/results.md has both with
    and without). An optimizer whose momentum is not known gets the step alone.

    Args:
        delay: see `LookAhead`.

    Examples:
        >>> weights = [torch.nn.Parameter(torch.ones(1))]
        >>> policy = FromDDP()
        >>> policy.bind(workers=4, gradients_per_update=1)
        >>> policy.check(torch.optim.AdamW(weights))
        >>> policy.step_factor([Arrival(worker=0, staleness=0, version=0, samples=8)])
        0.5
    """

    def __init__(self, delay: float | None = None) -> None:
        super().__init__(delay)
        self._workers = self._gradients = 1
        self._factor, self._versions = 1.0, 0.0

    @override
    def bind(self, workers: int, gradients_per_update: int) -> None:
        super().bind(workers, gradients_per_update)
        self._workers, self._gradients = workers, gradients_per_update
        self._versions = self._delay

    @override
    def check(self, optimizer: torch.optim.Optimizer) -> None:
        self._factor = ddp_step_factor(optimizer, self._workers, self._gradients)
        # Steps are shorter, and so is what lies ahead.
        self._delay = self._versions * self._factor

    @override
    def step_factor(self, arrivals: Sequence[Arrival]) -> float:
        return self._factor

    @override
    def look_ahead(self, out: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        if family_of(optimizer) is not None:
            super().look_ahead(out, optimizer)
