"""Runs of emulated step time, for benchmarks: a rank sleeps as long as its hardware would compute."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_async

__all__ = ["LENET5_PARAMETERS", "RESNET18_PARAMETERS", "hush_lightning", "measure"]

LENET5_PARAMETERS = 44_426
RESNET18_PARAMETERS = 11_173_962


class SleepingModule(LightningModule):
    """Parameters whose gradient costs little more than writing it; each rank sleeps its step time.

    Args:
        parameters: number of parameters.
        step_s: seconds per step of each rank.
    """

    def __init__(self, parameters: int, step_s: Sequence[float]) -> None:
        super().__init__()
        # As many tensors as ResNet18 has, so that a large model's gradient comes in pieces that fit into a cache.
        sizes = [parameters] if parameters < 1_000_000 else [len(part) for part in torch.arange(parameters).chunk(62)]
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)
        self.step_s = step_s
        self.started = self.ended = 0.0

    def on_train_start(self) -> None:
        self.trainer.strategy.barrier()
        self.started = time.perf_counter()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.step_s[self.global_rank])
        return torch.stack([weight.sum() for weight in self.weights]).sum() * batch[0].mean()

    def on_train_end(self) -> None:
        self.ended = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return lightning_async.AMSGrad(self.parameters(), lr=1e-4, fused=True)


def measure(strategy: Any, step_s: Sequence[float], batches: int, parameters: int) -> dict[str, float]:
    """Trains in ranks of their own and returns rank 0's view of it.

    Args:
        strategy: a name or a factory (called in the measuring process) of a strategy that forks its ranks.
        step_s: seconds per step of each rank.
        batches: batches over all ranks.
        parameters: number of parameters of the model.

    Returns:
        ``batches_per_second`` over all ranks, ``start_s`` from the call of fit to the first batch, and for
        asynchronous strategies ``waiting``: the fraction of its time that the mean rank spent in push and pull.
    """
    # A process per measurement, so that none inherits the threads and process groups of another.
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(queue, strategy, list(step_s), batches, parameters))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the measurement of {strategy} failed with exit code {process.exitcode}")
    return dict(queue.get())


def _measure(queue: Any, strategy: Any, step_s: list[float], batches: int, parameters: int) -> None:
    warnings.filterwarnings("ignore")
    ranks = len(step_s)
    results: Any = multiprocessing.get_context("fork").SimpleQueue()

    class Reporting(SleepingModule):
        def on_train_end(self) -> None:
            super().on_train_end()
            if self.global_rank == 0:
                seconds = self.ended - self.started
                found = {"batches_per_second": batches / seconds, "start_s": self.started - called}
                stats = getattr(self.trainer.strategy, "stats", None)
                if stats is not None:
                    found["waiting"] = sum(stats.wait_seconds_by_rank.values()) / (seconds * ranks)
                    found["staleness_max"] = max(stats.staleness)
                results.put(found)

    module = Reporting(parameters, step_s)
    hush_lightning()
    trainer = Trainer(
        strategy=strategy() if callable(strategy) else strategy,
        accelerator="cpu",
        devices=ranks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if isinstance(trainer.strategy, lightning_async.AsyncStrategy):
        trainer.strategy.summary = False
    called = time.perf_counter()
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(batches, 1)), batch_size=1))
    queue.put(results.get())


def hush_lightning() -> None:
    """Keeps what Lightning says of each run out of a benchmark's table."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
