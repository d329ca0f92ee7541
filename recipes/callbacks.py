"""Callbacks of the recipes: emulate ranks of different speed, measure the time to an accuracy."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

__all__ = ["EmulatedStepTime", "TimeToAccuracy"]


class EmulatedStepTime(Callback):
    """Make ranks differ in speed by sleeping in each training batch, between forward and backward.

    A sleeping rank uses no processor, so a machine with few cores behaves like accelerators of different speed.

    Args:
        seconds_by_rank: how long each rank sleeps in each of its batches, in seconds, rank 0 first. Ranks
            beyond the list do not sleep.

    Raises:
        ValueError: if a duration is negative.
    """

    def __init__(self, seconds_by_rank: list[float]) -> None:
        if any(seconds < 0 for seconds in seconds_by_rank):
            raise ValueError(f"seconds_by_rank must not be negative, got {seconds_by_rank}")
        self.seconds_by_rank = seconds_by_rank

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sleep for this rank's duration."""
        if trainer.global_rank < len(self.seconds_by_rank):
            time.sleep(self.seconds_by_rank[trainer.global_rank])


class TimeToAccuracy(Callback):
    """Measure how long training takes to reach an accuracy, and write what was measured as JSON.

    Rank 0 writes the file when fit ends, and again with the test metrics if the same trainer tests
    afterwards. Its keys:

    - `strategy`: class name of the strategy;
    - `seconds_to_threshold`: seconds from the start of training to the end of the first validation at
      which `monitor` is at least `threshold`; null if that never happened;
    - `curve`: [seconds, value of `monitor`] at the end of each validation;
    - `batches`: training batches over all ranks; `seconds`: duration of training, validations included;
    - `stats`: the strategy's own statistics, if it keeps some; else null;
    - `test`: metrics of the test that followed, empty if none did.

    Args:
        path: the file to write; missing folders are created.
        monitor: a metric that validation logs, the larger the better.
        threshold: the value of `monitor` to wait for.
    """

    def __init__(self, path: str, monitor: str = "val/acc", threshold: float = 0.95) -> None:
        self.path = Path(path)
        self.monitor = monitor
        self.threshold = threshold
        self._start_s = 0.0
        self._batches = 0
        self._seconds = 0.0
        self._curve: list[tuple[float, float]] = []
        self._results: dict[str, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and forget an earlier fit."""
        self._batches, self._curve, self._results = 0, [], {}
        self._start_s = time.perf_counter()

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the batch."""
        self._batches += 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the curve.

        Raises:
            KeyError: if validation logs no metric called `monitor`.
        """
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        seconds = time.perf_counter() - self._start_s
        if self.monitor not in trainer.callback_metrics:
            raise KeyError(
                f"TimeToAccuracy monitors {self.monitor!r}, which validation does not log; "
                f"logged are {sorted(trainer.callback_metrics)}"
            )
        self._curve.append((seconds, trainer.callback_metrics[self.monitor].item()))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds = time.perf_counter() - self._start_s

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks' batches and write the file."""
        local = torch.tensor(self._batches, device=pl_module.device)
        total = trainer.strategy.reduce(local, reduce_op="sum")
        stats = getattr(trainer.strategy, "stats", None)
        self._results = {
            "strategy": type(trainer.strategy).__name__,
            "monitor": self.monitor,
            "threshold": self.threshold,
            "seconds_to_threshold": next((s for s, value in self._curve if value >= self.threshold), None),
            "curve": self._curve,
            "batches": int(total),
            "seconds": self._seconds,
            "stats": None if stats is None else stats.as_dict(),
            "test": {},
        }
        self._write(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the test metrics to the file if a fit came before."""
        if self._results:
            self._results["test"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self._results, indent=2) + "\n")
