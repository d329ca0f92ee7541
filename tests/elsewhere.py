"""An optimizer that is a user's own, in a module that wants the whole package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_async import RunStats

__all__ = ["Signs"]


class Signs(torch.optim.Optimizer):
    """Steps by the gradient's sign, and keeps what torch's own pickling would lose."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.name_of_a_class = RunStats.__name__
        self.scale = torch.tensor(0.5)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient: Tensor | None = parameter.grad
                if gradient is not None:
                    parameter.sub_(group["lr"] * self.scale * gradient.sign())
        return None
