"""The callback that `compare` adds to a run: what the table and the plots are made of, as JSON."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

__all__ = ["RunRecorder"]


class RunRecorder(Callback):
    """Record how a fit goes, with any strategy; rank 0 writes the file.

    A point is recorded at each validation and at the end of each epoch; the two are one point if no batch lies
    between them. The file is written anew with each point, whole or not at all. Its keys:

    - `finished`: whether fit came to its end;
    - `strategy`: class name of the strategy; `ranks`: their number; `max_epochs`: as the Trainer has it;
    - `points`: a list of
        - `epoch`: epochs so far, a fraction within one;
        - `updates`: of the parameters so far, over all ranks;
        - `batches`: training batches so far, over all ranks;
        - `seconds`: duration of training so far, without validation; `seconds_total`: with it;
        - `train_loss`: mean of what `training_step` returned since the point before, over all ranks; null if
          it returned no loss;
        - `metrics`: all that is logged, as rank 0 has it;
    - `stats`: the strategy's own statistics, if it keeps some; else null.

    Args:
        path: the file; missing folders are created.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._points: list[dict[str, Any]] = []
        self._clock = _Stopwatch()
        self._sums = torch.zeros(3)
        self._epoch_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, and start the clock."""
        self._points, self._epoch_batches = [], 0
        self._forget_batches(pl_module)
        self._write(trainer, finished=False)
        self._clock = _Stopwatch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch to the sums. Nothing is read from an accelerator."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._sums[2] += 1
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning has divided it, so that the gradients of an update's batches add up to their mean.
            self._sums[0] += loss.detach().float().reshape(()) * trainer.accumulate_grad_batches
            self._sums[1] += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the training."""
        if _in_fit(trainer):
            self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a point, and let the clock go on."""
        if _in_fit(trainer):
            self._record(trainer, pl_module, epoch_is_over=False)
            self._clock.resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a point."""
        self._clock.pause()
        self._record(trainer, pl_module, epoch_is_over=True)
        self._epoch_batches = 0
        self._clock.resume()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file for the last time."""
        self._write(trainer, finished=True)

    def _record(self, trainer: Trainer, pl_module: LightningModule, epoch_is_over: bool) -> None:
        # Both are collective: every rank comes here, at the same points.
        loss, losses, batches = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self._forget_batches(pl_module)
        self._epoch_batches += int(batches)
        expected = trainer.num_training_batches * trainer.world_size
        point = {
            "epoch": trainer.current_epoch + (1.0 if epoch_is_over else min(1.0, self._epoch_batches / expected)),
            "updates": _updates(trainer),
            "batches": int(batches),
            "seconds": self._clock.running_s,
            "seconds_total": self._clock.total_s,
            "train_loss": loss / losses if losses else None,
            "metrics": metrics,
        }
        if self._points and not batches:
            before = self._points.pop()
            point["train_loss"], point["batches"] = before["train_loss"], before["batches"]
            point["metrics"] = {**before["metrics"], **metrics}
        elif self._points:
            point["batches"] += self._points[-1]["batches"]
        self._points.append(point)
        self._write(trainer, finished=False)

    def _forget_batches(self, pl_module: LightningModule) -> None:
        # Sum of losses, their number, number of batches; on the device, so that adding waits for nothing.
        self._sums = torch.zeros(3, device=pl_module.device)

    def _write(self, trainer: Trainer, finished: bool) -> None:
        if not trainer.is_global_zero:
            return
        stats: Any = getattr(trainer.strategy, "stats", None)
        content = {
            "finished": finished,
            "strategy": type(trainer.strategy).__name__,
            "ranks": trainer.world_size,
            "max_epochs": trainer.max_epochs,
            "points": self._points,
            "stats": stats.as_dict() if finished and hasattr(stats, "as_dict") else None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(content))
        os.replace(unfinished, self.path)


class _Stopwatch:
    """Runs from its creation, and can be paused."""

    def __init__(self) -> None:
        self._start_s = self._resumed_s = time.perf_counter()
        self._before_s = 0.0
        self._paused = False

    def pause(self) -> None:
        if not self._paused:
            self._before_s += time.perf_counter() - self._resumed_s
            self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._resumed_s = time.perf_counter()
            self._paused = False

    @property
    def running_s(self) -> float:
        return self._before_s + (0.0 if self._paused else time.perf_counter() - self._resumed_s)

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._start_s


def _in_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _updates(trainer: Trainer) -> int:
    version = getattr(trainer.strategy, "version", None)
    return version if isinstance(version, int) else trainer.global_step
