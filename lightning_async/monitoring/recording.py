"""Measures a fit at its evaluations and makes its record, with any strategy; for callbacks to own."""

from __future__ import annotations

import datetime
import shlex
import socket
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_async.monitoring.machine import machine_facts, package_version
from lightning_async.monitoring.record import RunRecord
from lightning_async.monitoring.series import Evaluation, Evaluations, Series
from lightning_async.monitoring.stats import RunStats
from lightning_async.monitoring.stopwatch import Stopwatch

__all__ = ["FitRecorder", "MeanLoss", "is_fitting", "returned_loss"]


def is_fitting(trainer: Trainer) -> bool:
    """Whether a validation belongs to a fit, and is not the one before it."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def returned_loss(trainer: Trainer, outputs: Any) -> Tensor | None:
    """The loss as ``training_step`` returned it, where it is: reading it would wait for the device.

    Args:
        trainer: the trainer.
        outputs: what ``on_train_batch_end`` is given.
    """
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    # Lightning has divided it, so that the gradients of an update's batches add up to their mean.
    scale = trainer.accumulate_grad_batches
    loss = loss.detach().float().reshape(())
    return loss if scale == 1 else loss * scale


class MeanLoss:
    """Adds up losses without reading them."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor) -> None:
        """Adds a loss."""
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1

    def take(self) -> tuple[float, int]:
        """Sum and number of the losses since the last call; waits for the device."""
        total, count = 0.0 if self._sum is None else float(self._sum), self._count
        self._sum, self._count = None, 0
        return total, count


class FitRecorder:
    """Measures a fit at each validation and at each epoch's end; the clock stands meanwhile.

    Its owner calls it from the hooks of the same names, on every rank: `evaluate` is a collective call.
    """

    def __init__(self) -> None:
        self.clock = Stopwatch()
        self.series = Series()
        self._started_at = _now()
        self._evaluations = Evaluations()
        self._loss = MeanLoss()
        self._new_batches = self._epoch_batches = self._batches = 0

    def add_batch(self, loss: Tensor | None) -> None:
        """Counts a batch of this rank.

        Args:
            loss: of the batch, from `returned_loss`.
        """
        self._new_batches += 1
        if loss is not None:
            self._loss.add(loss)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule, epoch_is_over: bool) -> None:
        """Adds an evaluation: what all ranks have done and rank 0 has logged."""
        own = [*self._loss.take(), self._new_batches]
        sums = trainer.strategy.reduce(torch.tensor(own, device=pl_module.device), reduce_op="sum")
        loss, losses, batches = sums.tolist()
        self._new_batches = 0
        self._batches += int(batches)
        self._epoch_batches += int(batches)
        expected = trainer.num_training_batches * trainer.world_size
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self._evaluations.add(
            Evaluation(
                epoch=trainer.current_epoch + (1.0 if epoch_is_over else min(1.0, self._epoch_batches / expected)),
                updates=_updates(trainer),
                batches=self._batches,
                seconds=self.clock.running_s,
                wall_seconds=self.clock.total_s,
                train_loss=loss / losses if losses else None,
                metrics=metrics,
            )
        )
        if epoch_is_over:
            self._epoch_batches = 0

    def record(self, trainer: Trainer, finished: bool, ended_by: str | None = None) -> RunRecord:
        """The record of what is known now, on rank 0.

        Args:
            trainer: the trainer.
            finished: whether the fit has come to its end.
            ended_by: what has ended it before; None while it goes on.
        """
        now = _now()
        over = {"ended_at": now} if finished or ended_by is not None else {}
        strategy: Any = trainer.strategy
        stats = getattr(strategy, "stats", None)
        record = RunRecord(
            strategy=type(strategy).__name__,
            ranks=trainer.world_size,
            max_epochs=trainer.max_epochs,
            finished=finished,
            written_at=now,
            evaluations=list(self._evaluations.kept),
            series=list(self.series.points),
            about={
                "module": type(trainer.lightning_module).__name__,
                "command": shlex.join(sys.argv),
                "host": socket.gethostname(),
                "started_at": self._started_at,
                **over,
                **({} if ended_by is None else {"ended_by": ended_by}),
                "epochs": trainer.current_epoch + (not finished),
                "global_step": trainer.global_step,
                "batches per rank and epoch": str(trainer.num_training_batches),
                "accumulate_grad_batches": int(trainer.accumulate_grad_batches),
                "precision": str(trainer.precision),
                "loss": "mean of rank 0's batches",
                **machine_facts(),
                "lightning_async": package_version(),
            },
        )
        if isinstance(stats, RunStats):
            record.stats = stats.as_dict()
            record.step_seconds = [
                [round(step, 6) for step in stats.step_seconds(rank)] for rank in record.stats["updates_by_rank"]
            ]
            record.configuration = dict(getattr(strategy, "configuration", {}))
        return record


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _updates(trainer: Trainer) -> int:
    version = getattr(trainer.strategy, "version", None)
    return version if isinstance(version, int) else trainer.global_step
