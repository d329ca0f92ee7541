"""What the strategy costs where nobody is slow: samples a second of real training steps, async_amsgrad beside DDP.

Run ``python -m benchmarks.overhead``. Ranks of one speed train LeNet-5 and ResNet18 on random images, one thread each.
For the asynchronous runs the time that rank 0 spends in each part of the exchange is added up and divided by its steps.
With more than one rank the holder is also given a process of its own (``holder="process"``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_async
from benchmarks.emulated import hush_lightning
from benchmarks.record import save
from lightning_async.binding import Binding
from lightning_async.holder import Holder
from lightning_async.worker import Worker
from recipes.models import LeNet5, ResNet18

ASYNC, APART, DDP = "async_amsgrad", "async_amsgrad, holder apart", "ddp"
# Model, image shape, batch size.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet-5": (LeNet5, (1, 28, 28), 64),
    "ResNet18": (ResNet18, (3, 32, 32), 16),
}
# Parts of a step, outermost first: what is inside another one is counted in both.
PARTS: dict[str, tuple[type, str]] = {
    "draw": (Worker, "draw"),
    "push and pull": (Worker, "step"),
    "gather gradients": (Binding, "gather"),
    "holder: update": (Holder, "try_push"),
    "holder: copy parameters": (Holder, "try_pull"),
    "land parameters": (Binding, "land"),
}


class ImageModule(LightningModule):
    """A classifier that leaves the first batches out of its measurement."""

    def __init__(self, net: nn.Module, warm_up: int) -> None:
        super().__init__()
        self.net = net
        self.warm_up = warm_up
        self.batches = 0
        self.started = self.ended = 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.batches == self.warm_up:
            self.started = time.perf_counter()
        self.batches += 1
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self.ended = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return lightning_async.AMSGrad(self.parameters(), lr=1e-4, fused=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=12.0, help="about how long each run takes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, taken in turns; medians are shown")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    for model in arguments.models:
        for ranks in arguments.ranks:
            runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for _ in range(arguments.repeats):
                for strategy in (ASYNC, DDP, APART) if ranks > 1 else (ASYNC, DDP):
                    runs[strategy].append(measure(model, ranks, strategy, arguments.seconds))
            rates = {
                strategy: sorted(run["samples_per_second"] for run in repeats)[len(repeats) // 2]
                for strategy, repeats in runs.items()
            }
            theirs = rates[DDP]
            row: dict[str, Any] = {"model": model, "ranks": ranks, "ddp": theirs}
            print(f"{model}, {ranks} rank(s): ddp {theirs:.0f} samples/s")
            for strategy in [ASYNC, APART] if ranks > 1 else [ASYNC]:
                ours, repeats = rates[strategy], runs[strategy]
                row[strategy] = {"samples_per_second": ours, "parts_us": repeats[-1]["parts_us"]}
                print(f"   {strategy} {ours:.0f} samples/s, {ours / theirs:.3f}")
                parts = (f"{name} {value:.0f} us" for name, value in repeats[-1]["parts_us"].items() if value)
                print("      " + ", ".join(parts), flush=True)
                if ranks > 1:
                    rank_0 = sorted(run["rank_0"] for run in repeats)[len(repeats) // 2]
                    row[strategy]["rank_0"] = rank_0
                    print(f"      rank 0 makes {rank_0:.3f} of another rank's samples a second", flush=True)
            found.append(row)
    save("overhead", vars(arguments), found)


def measure(model: str, ranks: int, strategy: str, seconds: float) -> dict[str, Any]:
    """Samples per second over all ranks, rank 0's over another's, and rank 0's time in each part of a step."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(queue, model, ranks, strategy, seconds))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the measurement of {strategy} failed with exit code {process.exitcode}")
    return dict(queue.get())


def _measure(queue: Any, model: str, ranks: int, strategy: str, seconds: float) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    make, shape, batch_size = MODELS[model]
    results: Any = multiprocessing.get_context("fork").SimpleQueue()
    per_rank = max(10, int(seconds / _step_seconds(make(), shape, batch_size)))
    warm_up = per_rank // 5
    spent = _time_parts()

    class Reporting(ImageModule):
        def on_train_end(self) -> None:
            steps = self.batches - self.warm_up
            rate = batch_size * steps / (self.ended - self.started)
            parts = {name: 1e6 * total / self.batches for name, total in spent.items()}
            results.put((self.global_rank, rate, parts))

    batches = per_rank * ranks
    data = TensorDataset(torch.randn(batches * batch_size, *shape), torch.zeros(batches * batch_size, dtype=torch.long))
    hush_lightning()
    trainer = Trainer(
        strategy="ddp_fork" if strategy == DDP else _asynchronous("process" if strategy == APART else "thread"),
        accelerator="cpu",
        devices=ranks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Reporting(make(), warm_up), DataLoader(data, batch_size))
    reports = sorted(results.get() for _ in range(ranks))
    rates = [rate for _, rate, _ in reports]
    others = sum(rates[1:]) / max(1, ranks - 1) or rates[0]
    queue.put({"samples_per_second": sum(rates), "rank_0": rates[0] / others, "parts_us": reports[0][2]})


def _asynchronous(holder: Literal["thread", "process"]) -> lightning_async.AsyncStrategy:
    return lightning_async.AsyncAMSGradStrategy(holder=holder, start_method="fork", summary=False)


def _step_seconds(net: nn.Module, shape: tuple[int, ...], batch_size: int) -> float:
    images, labels = torch.randn(batch_size, *shape), torch.zeros(batch_size, dtype=torch.long)
    durations = []
    for _ in range(4):
        started = time.perf_counter()
        loss: Any = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        durations.append(time.perf_counter() - started)
    return min(durations)


def _time_parts() -> dict[str, float]:
    """Adds up, in this process's training thread, the time spent in each of `PARTS`."""
    spent = dict.fromkeys(PARTS, 0.0)
    for name, (owner, method) in PARTS.items():
        setattr(owner, method, _timed(getattr(owner, method), name, spent))
    return spent


def _timed(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started

    return timed


if __name__ == "__main__":
    main()
