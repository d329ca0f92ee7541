"""An optimizer that is a user's own, in a module that wants the whole package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_async import RunStats

__all__ = ["ScheduleFreeSGD", "Signs"]


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


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Keeps an average x of its iterates z: trains at y, between the two, and is evaluated at x, as its user says."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "count": 0, "train_mode": False})

    @torch.no_grad()
    def train(self) -> None:
        self._move(train_mode=True)

    @torch.no_grad()
    def eval(self) -> None:
        self._move(train_mode=False)

    def _move(self, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train_mode:
                weight = 1 - group["momentum"] if train_mode else 1 - 1 / group["momentum"]
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("it is not in train mode")
            group["count"] += 1
            share = 1 / group["count"]
            for parameter in group["params"]:
                gradient: Tensor | None = parameter.grad
                if gradient is not None:
                    z = self.state[parameter].setdefault("z", parameter.clone())
                    parameter.lerp_(z, share)
                    parameter.sub_(gradient, alpha=group["lr"] * (1 - group["momentum"] * (1 - share)))
                    z.sub_(gradient, alpha=group["lr"])
        return None
