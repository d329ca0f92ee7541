"""The mean of the gradients that make an update, where it takes more than one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gathered", "GradientMean"]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Gradients that wait for more to make an update with: a part of a checkpoint.

    Args:
        gradients: their weighted sum, for each parameter; None where none of them had one.
        weight: sum of the weights.
        count: their number.
    """

    gradients: list[Tensor | None]
    weight: float
    count: int


class GradientMean:
    r"""Adds up gradients and gives their mean: :math:`\sum_i n_i g_i / \sum_i n_i`, where :math:`n_i` counts samples.

    That is the gradient of the mean over all samples, if each :math:`g_i` is that of a mean over its own. A parameter
    that took no part in some of them counts with zero there, as under DDP; one that took part in none stays without.

    Examples:
        >>> mean = GradientMean()
        >>> mean.add([torch.tensor([1.0]), None], samples=1)
        >>> mean.add([torch.tensor([4.0]), None], samples=2)
        >>> mean.take()
        [tensor([3.]), None]
    """

    def __init__(self) -> None:
        self._sums: list[Tensor | None] = []
        self._buffers: list[Tensor | None] = []
        self._weight = 0.0

    def add(self, gradients: Sequence[Tensor | None], samples: int) -> None:
        """Adds a gradient; its tensors are the caller's again afterwards.

        Args:
            gradients: one per parameter, None where it takes no part.
            samples: its weight; one if the number of samples is not known.
        """
        weight = float(samples or 1)
        if not self._sums:
            self._sums, self._buffers = [None] * len(gradients), self._buffers or [None] * len(gradients)
        added, sums = [], []
        with torch.no_grad():
            for place, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                total = self._sums[place]
                if total is None:
                    self._sums[place] = self._first(place, gradient, weight)
                else:
                    added.append(gradient)
                    sums.append(total)
            if added:
                torch._foreach_add_(sums, added, alpha=weight)
        self._weight += weight

    def take(self) -> list[Tensor | None]:
        """The mean of what was added, which begins anew; good until the next `add`."""
        present = [total for total in self._sums if total is not None]
        if present:
            torch._foreach_mul_(present, 1.0 / self._weight)
        sums, self._sums, self._weight = self._sums, [], 0.0
        return sums

    def gathered(self, count: int) -> Gathered | None:
        """A copy of what was added; None if that is nothing.

        Args:
            count: how many gradients.
        """
        if not count:
            return None
        return Gathered([None if one is None else one.clone() for one in self._sums], self._weight, count)

    def load(self, gathered: Gathered | None) -> None:
        """Goes on from what `gathered` has returned."""
        self._sums, self._weight = [], 0.0
        if gathered is not None:
            self._sums = [None if one is None else one.clone() for one in gathered.gradients]
            self._buffers, self._weight = [*self._sums], gathered.weight

    def _first(self, place: int, gradient: Tensor, weight: float) -> Tensor:
        # The memory is kept from update to update.
        buffer = self._buffers[place]
        if buffer is None or buffer.shape != gradient.shape:
            buffer = self._buffers[place] = torch.empty_like(gradient)
        return torch.mul(gradient, weight, out=buffer)
