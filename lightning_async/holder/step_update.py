"""An optimizer's update by its own ``step``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_async.holder.layout import all_parameters
from lightning_async.holder.rebuild import step_without_hooks

__all__ = ["FusedSGDUpdate", "StepUpdate"]


class StepUpdate:
    """An optimizer's update by its own ``step``.

    Args:
        optimizer: over the holder's tensors; its state is the state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = all_parameters(optimizer)
        self._make_step = step_without_hooks(optimizer)

    def forget(self) -> None:
        """To be called when the optimizer has loaded another state."""

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Applies one update, with one gradient per parameter, None where it takes no part."""
        self._step(gradients)

    def _step(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._make_step()
        for parameter in self._parameters:
            parameter.grad = None


class FusedSGDUpdate(StepUpdate):
    """The update of SGD with momentum by torch's fused kernel, which wants all momentum buffers or none.

    Where some parameters have had their first gradient and others have it now, these are stepped first, by themselves.

    Args:
        optimizer: `torch.optim.SGD`, which treats each parameter by itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self._complete = False

    def forget(self) -> None:
        """To be called when the optimizer has loaded another state."""
        self._complete = False

    def _step(self, gradients: Sequence[Tensor | None]) -> None:
        if not self._complete:
            state = self._optimizer.state
            fresh = [state.get(parameter, {}).get("momentum_buffer") is None for parameter in self._parameters]
            self._complete = not any(fresh)
            if any(fresh) and not all(fresh):
                super()._step([gradient if new else None for gradient, new in zip(gradients, fresh, strict=True)])
                gradients = [None if new else gradient for gradient, new in zip(gradients, fresh, strict=True)]
        super()._step(gradients)
