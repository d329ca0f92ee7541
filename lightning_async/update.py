"""The holder's update: the optimizer's kernel, called without gathering its arguments anew.

Above `amsgrad.py`; below `holder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.amsgrad import STEP_AT_INFINITY, GroupHyper, set_group_hyper

__all__ = ["FusedUpdate"]


class FusedUpdate:
    """An optimizer's update with the kernel's arguments made once, for a holder that steps thousands of times a second.

    ``optimizer.step`` spends twice the kernel's time on small models gathering the same lists again. This calls the
    same kernel on the same tensors; where a parameter has no gradient, or the tensors cannot be fused, it is
    ``optimizer.step``.

    Args:
        optimizer: from `holder_optimizer`; its state is the state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._state: list[list[list[Tensor]]] | None = None
        # The step counts of all parameters: one addition for all of them, where the kernel reads them.
        self._counts = torch.zeros(len(self._parameters), device=self._parameters[0].device)

    def forget(self) -> None:
        """To be called when the optimizer has loaded another state."""
        self._state = None

    def __call__(self, gradients: Sequence[Tensor | None], hypers: Sequence[GroupHyper]) -> None:
        """Applies one update.

        Args:
            gradients: one per parameter, None where it takes no part.
            hypers: the hyper-parameters of each param group.
        """
        groups = self._optimizer.param_groups
        for group, hyper in zip(groups, hypers, strict=True):
            set_group_hyper(group, hyper)
        if self._state is None or any(gradient is None for gradient in gradients):
            self._step(gradients)
            return
        self._counts.add_(1)
        start = 0
        for group, (parameters, *moments, steps) in zip(groups, self._state, strict=True):
            taken = gradients[start : start + len(parameters)]
            start += len(parameters)
            told = steps
            if not group["bias_correction"]:
                told = [torch.full_like(step, STEP_AT_INFINITY) for step in steps[:1]] * len(steps)
            kernel: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                parameters,
                taken,
                *moments,
                told,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=True,
                maximize=group["maximize"],
                grad_scale=None,
                found_inf=None,
            )

    def _step(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        self._state = self._gather()

    def _gather(self) -> list[list[list[Tensor]]] | None:
        groups, state = self._optimizer.param_groups, self._optimizer.state
        if not all(group["fused"] for group in groups) or any(not state.get(p) for p in self._parameters):
            return None
        for parameter, count in zip(self._parameters, self._counts.unbind(), strict=True):
            count.copy_(state[parameter]["step"])
            state[parameter]["step"] = count
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        # Detached, autograd has no part in what happens to the parameters.
        return [
            [
                [parameter.detach() for parameter in group["params"]],
                *([state[p][name] for p in group["params"]] for name in names),
            ]
            for group in groups
        ]
