"""What one gradient costs under the holder's lock, against the kernel and the copy that an update consists of.

Run ``python -m benchmarks.update``, with ``--k 1 2 4`` for updates that are made of several gradients. One thread, no
processes, no messages; the best of many repetitions. The last column is what a worker spends on looking for NaN and
infinity in its gradient (``reject_nonfinite``), which the holder does not spend.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.processes import SHAPES, Shapes
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.finite import all_finite
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import Push
from lightning_async.runtime.failure import FailureLatch


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[1], metavar="K", help="gradients that make an update")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("parameters    K  push and pull, us  kernel, us  copy, us  over kernel + copy  finite?, us")
    for size in ("44K", "11.2M"):
        for gradients in arguments.k:
            exchange, kernel, copy = measure(SHAPES[size], gradients)
            check = look_for_nonfinite(SHAPES[size])
            ratio = exchange / (kernel + copy)
            times = f"{exchange * 1e6:>18.0f} {kernel * 1e6:>11.0f} {copy * 1e6:>9.0f}"
            print(f"{size:>10} {gradients:>4} {times} {ratio:>19.2f} {check * 1e6:>12.1f}")


def measure(shapes: Shapes, gradients_per_update: int = 1) -> tuple[float, float, float]:
    """Seconds of a push and pull at the holder, of the fused kernel on the same tensors, and of one copy."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AMSGrad(parameters, lr=1e-3)
    layout = FlatLayout([parameters])
    barrier = StalenessBarrier(8, gradients_per_update=gradients_per_update)
    holder = Holder(layout, layout.buffer(), [optimizer], barrier, FailureLatch())
    gradient, out = layout.buffer().normal_(), layout.buffer()
    views, groups = layout.views(gradient, 0), HyperparamLayout(optimizer).read(optimizer.param_groups)
    holder.try_pull(0, out)

    def exchange() -> None:
        for _ in range(gradients_per_update):
            holder.try_push(Push(0, 0, holder.version, views, groups, flat=gradient))
            holder.try_pull(0, out)

    moments: list[list[Any]] = [[torch.zeros(shape) for shape in shapes] for _ in range(3)]
    steps = [torch.zeros(()) for _ in shapes]
    fused: Any = torch._fused_adam_

    @torch.no_grad()
    def kernel() -> None:
        torch._foreach_add_(steps, 1)
        options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
        fused(parameters, views, *moments, steps, **options, amsgrad=True, maximize=False)

    repetitions = max(5, 2_000_000 // layout.numel)
    copy = functools.partial(out.copy_, gradient)
    return (
        best_of(exchange, repetitions) / gradients_per_update,
        best_of(kernel, repetitions),
        best_of(copy, repetitions),
    )


def look_for_nonfinite(shapes: Shapes) -> float:
    """Seconds that a worker spends on a gradient that is finite."""
    parts = [torch.zeros(shape) for shape in shapes]
    flat = torch.zeros(sum(part.numel() for part in parts)).normal_()
    present = [True] * len(parts)
    return best_of(lambda: all_finite(flat, parts, present), max(5, 20_000_000 // flat.numel()))


def best_of(run: Callable[[], object], repetitions: int, rounds: int = 20) -> float:
    """Seconds of one call in the best round."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(repetitions):
            run()
        best = min(best, (time.perf_counter() - started) / repetitions)
    return best


if __name__ == "__main__":
    main()
