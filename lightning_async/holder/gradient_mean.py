"""The mean of the gradients that make an update, where it takes more than one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_async.holder.team import Team

__all__ = ["Gathered", "GradientMean"]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Gradients that wait for more to make an update with: a part of a checkpoint.

    Args:
        gradients: their weighted sum, for each parameter; None where none of them had one.
        weight: sum of the weights.
        count: their number.
        late: weighted sum of their late parts, which the staleness policy corrects by; None if it has none.
        arrivals: of each its worker, staleness, version and samples, where a staleness policy asks.
    """

    gradients: list[Tensor | None]
    weight: float
    count: int
    late: list[Tensor | None] | None = None
    arrivals: list[tuple[int, int, int, int]] = field(default_factory=list)

    def to(self, device: torch.device) -> Gathered:
        """The same with the gradients on a device."""
        gradients = [None if one is None else one.to(device) for one in self.gradients]
        late = None if self.late is None else [None if one is None else one.to(device) for one in self.late]
        return replace(self, gradients=gradients, late=late)


class GradientMean:
    r"""Adds up gradients and gives their mean: :math:`\sum_i n_i g_i / \sum_i n_i`, where :math:`n_i` counts samples.

    That is the gradient of the mean over all samples, if each :math:`g_i` is that of a mean over its own. A parameter
    that took no part in some of them counts with zero there, as under DDP; one that took part in none stays without.

    Args:
        buffer: flat memory for the sum; taken over.
        views: the parts of it that belong to the parameters.
        team: the holder's threads; None for the calling one alone.

    Examples:
        >>> buffer = torch.zeros(2)
        >>> mean = GradientMean(buffer, [buffer[:1], buffer[1:]])
        >>> mean.add([torch.tensor([1.0]), None], samples=1)
        >>> mean.add([torch.tensor([4.0]), None], samples=2)
        >>> mean.take()
        [tensor([3.]), None]
    """

    def __init__(self, buffer: Tensor, views: Sequence[Tensor], team: Team | None = None) -> None:
        self._team = team or Team()
        self._sum = buffer
        self._views = [*views]
        # Which parameters had a gradient in what was added; none of them where nothing was.
        self._present: list[bool] = []
        self._weight = 0.0

    @property
    def weight(self) -> float:
        """Sum of the weights of what was added."""
        return self._weight

    @torch.no_grad()
    def add(
        self,
        gradients: Sequence[Tensor | None],
        samples: int,
        flat: Tensor | None = None,
        factors: float | Sequence[float] = 1.0,
    ) -> None:
        """Adds a gradient; its tensors are the caller's again afterwards.

        Args:
            gradients: one per parameter, None where it takes no part.
            samples: its weight; one if the number of samples is not known.
            flat: what all the gradients are parts of, as the views are of the buffer; saves time.
            factors: what it is multiplied by, which leaves its weight in the denominator; one for all, or for each
                parameter its own.
        """
        weight = float(samples or 1)
        present = [gradient is not None for gradient in gradients]
        if flat is not None and all(present) and isinstance(factors, float):
            self._add_flat(flat, weight * factors)
        else:
            if not self._present:
                self._sum.zero_()
            each = [factors] * len(present) if isinstance(factors, float) else factors
            for view, gradient, factor in zip(self._views, gradients, each, strict=True):
                if gradient is not None:
                    view.add_(gradient, alpha=weight * factor)
        earlier = self._present or [False] * len(present)
        self._present = [before or now for before, now in zip(earlier, present, strict=True)]
        self._weight += weight

    @torch.no_grad()
    def take(self, weight: float | None = None) -> list[Tensor | None]:
        """The mean of what was added, which begins anew; good until the next `add`.

        Args:
            weight: what the sum is divided by; None takes the weights of what was added.
        """
        if self._present:
            factor = 1.0 / (self._weight if weight is None else weight)
            self._team.over(self._sum.numel(), lambda part: self._sum[part].mul_(factor))
        taken = self._parts()
        self._present, self._weight = [], 0.0
        return taken

    def gathered(self, count: int) -> Gathered | None:
        """A copy of what was added; None if that is nothing.

        Args:
            count: how many gradients.
        """
        sums = self.sums()
        return None if sums is None else Gathered(sums, self._weight, count)

    def load(self, gathered: Gathered | None) -> None:
        """Goes on from what `gathered` has returned."""
        self._present, self._weight = [], 0.0
        if gathered is not None:
            self.add(gathered.gradients, samples=1)
            self._weight = gathered.weight

    def sums(self) -> list[Tensor | None] | None:
        """A copy of the weighted sums; None if nothing was added."""
        return [None if one is None else one.clone() for one in self._parts()] if self._present else None

    def _add_flat(self, flat: Tensor, factor: float) -> None:
        if self._present:
            self._team.over(flat.numel(), lambda part: self._sum[part].add_(flat[part], alpha=factor))
        else:
            self._team.over(flat.numel(), lambda part: torch.mul(flat[part], factor, out=self._sum[part]))

    def _parts(self) -> list[Tensor | None]:
        return [view if there else None for view, there in zip(self._views, self._present, strict=True)]
