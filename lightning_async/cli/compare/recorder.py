"""The callback that `compare` adds to a run: it writes what the table and the plots are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_async.monitoring.recording import FitRecorder, is_fitting, returned_loss

__all__ = ["RunRecorder"]


class RunRecorder(Callback):
    """Write a `RunRecord` of a fit with any strategy, anew at each validation and at the end of each epoch.

    Args:
        path: the file; missing folders are created.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._recorder = FitRecorder()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, and start the clock."""
        self._recorder = FitRecorder()
        self._write(trainer, finished=False)
        self._recorder = FitRecorder()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch. Nothing is read from an accelerator."""
        self._recorder.add_batch(returned_loss(trainer, outputs))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the training."""
        if is_fitting(trainer):
            self._recorder.clock.pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record an evaluation, and let the clock go on."""
        if is_fitting(trainer):
            self._evaluate(trainer, pl_module, epoch_is_over=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record an evaluation."""
        self._evaluate(trainer, pl_module, epoch_is_over=True)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file for the last time."""
        self._write(trainer, finished=True)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, epoch_is_over: bool) -> None:
        self._recorder.clock.pause()
        self._recorder.evaluate(trainer, pl_module, epoch_is_over)
        self._write(trainer, finished=False)
        self._recorder.clock.resume()

    def _write(self, trainer: Trainer, finished: bool) -> None:
        if trainer.is_global_zero:
            self._recorder.record(trainer, finished).write(self.path)
