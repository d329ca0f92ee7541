"""Keeps the record of a fit up to date on disk while it runs; for a callback to own."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_async.monitoring.pace import Pace
from lightning_async.monitoring.record import RECORD_NAME
from lightning_async.monitoring.recording import FitRecorder, MeanLoss, is_fitting, returned_loss
from lightning_async.monitoring.series import Point
from lightning_async.monitoring.stats import RunStats

__all__ = ["RecordFile"]


class RecordFile:
    """Measures a fit from the hooks of the same names, on every rank, and writes its record on rank 0.

    Args:
        trainer: the trainer.
        folder: where the record goes.
        stats: the run's statistics, collected on rank 0.

    Attributes:
        path: the record.
    """

    def __init__(self, trainer: Trainer, folder: Path, stats: RunStats) -> None:
        self.path = folder / RECORD_NAME
        self._trainer = trainer
        self._stats = stats
        self._recorder = FitRecorder()
        # Of rank 0's batches since the last point of the series.
        self._loss = MeanLoss()
        self._pace = Pace()
        self._keep_up()

    def on_train_batch_end(self, outputs: Any) -> None:
        """Counts a batch and notes its loss; on rank 0 notes where the run stands and writes it, where that is due."""
        loss = returned_loss(self._trainer, outputs)
        self._recorder.add_batch(loss)
        if not self._trainer.is_global_zero:
            return
        if loss is not None:
            self._loss.add(loss)
        if self._recorder.series.due(self._recorder.clock.total_s):
            self._note()
        self._keep_up()

    def on_validation_start(self) -> None:
        """Ends the stretch of training."""
        if is_fitting(self._trainer):
            self._recorder.clock.pause()

    def on_validation_end(self, pl_module: LightningModule) -> None:
        """Adds what validation has found; a collective call."""
        if is_fitting(self._trainer):
            self._recorder.evaluate(self._trainer, pl_module, epoch_is_over=False)
            self._keep_up()
            self._recorder.clock.resume()

    def on_train_epoch_end(self, pl_module: LightningModule) -> None:
        """Adds what is known at the epoch's end; a collective call."""
        self._recorder.clock.pause()
        self._recorder.evaluate(self._trainer, pl_module, epoch_is_over=True)
        self._keep_up()
        self._recorder.clock.resume()

    def finish(self, ended_by: str | None = None) -> None:
        """Writes the record for the last time, on rank 0; no collective.

        Args:
            ended_by: what has ended the fit early; None if it has come to its end.
        """
        if self._trainer.is_global_zero:
            self._note()
            self._write(finished=ended_by is None, ended_by=ended_by)

    def _keep_up(self) -> None:
        if self._trainer.is_global_zero and self._pace.due(self._recorder.clock.total_s):
            self._write(finished=False)

    def _note(self) -> None:
        stats = self._stats.counts()
        total, count = self._loss.take()
        self._recorder.series.add(
            Point(
                seconds=round(stats["train_seconds"], 4),
                wall_seconds=round(self._recorder.clock.total_s, 4),
                updates=stats["updates"],
                staleness_sum=sum(age * count for age, count in stats["staleness"].items()),
                loss=total / count if count and math.isfinite(total) else None,
            )
        )

    def _write(self, finished: bool, ended_by: str | None = None) -> None:
        now_s, started = self._recorder.clock.total_s, time.perf_counter()
        record = self._recorder.record(self._trainer, finished, ended_by)
        record.about["seconds spent on this record"] = round(self._pace.spent_s, 3)
        record.write(self.path)
        self._pace.wrote(now_s, time.perf_counter() - started)
