"""Gradients times a factor, in memory of the holder's own: the gradient itself may be the worker's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.team import Team

__all__ = ["ScaledGradients"]


class ScaledGradients:
    """Multiplies gradients into a buffer, which is made when it is first needed.

    Args:
        layout: where each parameter lies.
        like: a flat buffer of the same size, type and device.
        team: the holder's threads; None for the calling one alone.

    Examples:
        >>> layout = FlatLayout([[torch.zeros(2), torch.zeros(1)]])
        >>> gradients = [torch.tensor([1.0, 2.0]), None]
        >>> ScaledGradients(layout, layout.buffer()).scale(0, gradients, [0.5, 1.0])
        [tensor([0.5000, 1.0000]), None]
    """

    def __init__(self, layout: FlatLayout, like: Tensor, team: Team | None = None) -> None:
        self._team = team or Team()
        self._layout = layout
        self._like = like
        self._buffer: Tensor | None = None
        self._views: list[list[Tensor]] = []

    @torch.no_grad()
    def scale(
        self,
        optimizer: int,
        gradients: Sequence[Tensor | None],
        factors: float | Sequence[float],
        flat: Tensor | None = None,
    ) -> list[Tensor | None]:
        """One optimizer's gradients times the factors; good until the next call.

        Args:
            optimizer: index of the optimizer.
            gradients: one per parameter, None where it takes no part.
            factors: one for all gradients, or for each its own.
            flat: what all the gradients are parts of, in the layout; saves time.
        """
        if self._buffer is None:
            self._buffer = torch.empty_like(self._like)
            self._views = [self._layout.views(self._buffer, index) for index in range(len(self._layout.ranges))]
        views = self._views[optimizer]
        if flat is not None and isinstance(factors, float) and all(gradient is not None for gradient in gradients):
            scaled = self._layout.segment(self._buffer, optimizer)
            self._team.over(flat.numel(), lambda part: torch.mul(flat[part], factors, out=scaled[part]))
            return [*views]
        each = [factors] * len(views) if isinstance(factors, float) else factors
        return [
            None if gradient is None else torch.mul(gradient, factor, out=view)
            for gradient, factor, view in zip(gradients, each, views, strict=True)
        ]
