"""What no exchange can do without, in one thread: the fused AMSGrad kernel and a copy of the parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.processes import Shapes

__all__ = ["floor_seconds"]


def floor_seconds(shapes: Shapes) -> tuple[float, float]:
    """Seconds of one fused AMSGrad kernel over all parameters, and of one copy of them."""
    parameters, gradients, *moments = [[torch.zeros(shape) for shape in shapes] for _ in range(5)]
    steps = [torch.ones(()) for _ in shapes]
    flat = torch.zeros(sum(tensor.numel() for tensor in parameters))
    out = torch.empty_like(flat)
    fused: Any = torch._fused_adam_
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}

    def kernel() -> None:
        fused(parameters, gradients, *moments, steps, **options, amsgrad=True, maximize=False)

    return _median_seconds(kernel), _median_seconds(lambda: out.copy_(flat))


def _median_seconds(call: Callable[[], object], total_s: float = 1.5) -> float:
    """The median duration of a call, over about ``total_s`` seconds."""
    call()
    durations: list[float] = []
    while sum(durations) < total_s:
        started = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started)
    return sorted(durations)[len(durations) // 2]
