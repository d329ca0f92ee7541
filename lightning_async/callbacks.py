"""`AsyncMonitor`: a callback that leaves a record and a timeline of the run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_async.holder.types import Update
from lightning_async.monitoring.record import RECORD_NAME
from lightning_async.monitoring.recording import FitRecorder, MeanLoss, is_fitting, returned_loss
from lightning_async.monitoring.series import Point
from lightning_async.monitoring.spans import SpanRecorder, StalenessRecorder
from lightning_async.monitoring.trace import write_trace
from lightning_async.strategies.strategy import AsyncStrategy

__all__ = ["AsyncMonitor"]

_WRITE_EVERY_S = 30.0


class AsyncMonitor(Callback):
    """Leaves what a run did: a record for ``lightning-async report``, and a timeline for ui.perfetto.dev.

    The files lie in ``trainer.log_dir``, which is ``default_root_dir`` without a logger, or in ``folder``. The record,
    ``async_run.json``, is written every 30 seconds and at the end of each epoch and of the fit; the timeline at the
    end of the fit. Both are bounded in size and memory. Under a strategy of another kind the callback does nothing.

    Args:
        trace: name of the timeline's file, for instance ``"run.json"``; None for no timeline. A relative name is
            relative to the folder.
        summary: whether rank 0 prints a short table at the end of fit; takes the place of the strategy's argument.
        folder: where the files go; None for the trainer's folder.
        trace_spans: the most spans of each rank in the timeline (a step has five or six); 17 bytes each while the run
            lasts and about 75 in the file. Later ones are counted in the file's metadata.

    Raises:
        MisconfigurationException: if an argument has no meaning, or if the folder is not a local one.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AsyncMonitor(trace="run.json")], logger=False)
    """

    def __init__(
        self,
        trace: str | None = None,
        summary: bool = True,
        folder: str | Path | None = None,
        trace_spans: int = 200_000,
    ) -> None:
        if trace_spans < 1:
            raise MisconfigurationException(f"trace_spans must be at least 1, not {trace_spans}.")
        self.trace = trace
        self.summary = summary
        self.folder = folder
        self.trace_spans = trace_spans
        self._folder: Path | None = None
        self._strategy: AsyncStrategy | None = None
        self._spans: SpanRecorder | None = None
        self._updates: StalenessRecorder | None = None
        self._recorder = FitRecorder()
        # Of rank 0's batches since the last point of the series.
        self._loss = MeanLoss()
        self._written_s = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, AsyncStrategy):
            rank_zero_info(f"AsyncMonitor has nothing to do under {type(trainer.strategy).__name__}.")
            return
        self._strategy = trainer.strategy
        self._strategy.summary = self.summary
        # On every rank: `log_dir` is a collective call.
        folder = trainer.log_dir if self.folder is None else self.folder
        folder = str(trainer.default_root_dir if folder is None else folder)
        if "://" in folder:
            raise MisconfigurationException(
                f"AsyncMonitor writes to a local folder and cannot write to {folder}. Pass AsyncMonitor(folder=...)."
            )
        self._folder = Path(folder)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to look."""
        strategy = self._strategy
        if strategy is None:
            return
        self._recorder, self._loss = FitRecorder(), MeanLoss()
        self._written_s = 0.0
        if self.trace is None:
            return
        self._spans = SpanRecorder(self.trace_spans)
        strategy.worker.on_span = self._spans.add
        if trainer.is_global_zero:
            self._updates = StalenessRecorder(strategy.world_size, self.trace_spans)
            strategy.observers.append(self._observe)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the time."""
        if self._spans is not None:
            self._spans.begin_batch(time.monotonic_ns())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time and the loss and, on rank 0, where the run stands."""
        if self._spans is not None:
            self._spans.end_batch(time.monotonic_ns())
        if self._strategy is None:
            return
        loss = returned_loss(trainer, outputs)
        self._recorder.add_batch(loss)
        if not trainer.is_global_zero:
            return
        if loss is not None:
            self._loss.add(loss)
        wall_s = self._recorder.clock.total_s
        if self._recorder.series.due(wall_s):
            self._note(self._strategy, wall_s)
        if wall_s - self._written_s >= _WRITE_EVERY_S:
            self._write(trainer, finished=False)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the stretch of training."""
        if self._spans is not None:
            self._spans.interrupt(time.monotonic_ns())
        if self._strategy is not None and is_fitting(trainer):
            self._recorder.clock.pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds what validation has found."""
        if self._strategy is not None and is_fitting(trainer):
            self._recorder.evaluate(trainer, pl_module, epoch_is_over=False)
            self._recorder.clock.resume()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record, so that a run that is killed later leaves one."""
        if self._spans is not None:
            self._spans.interrupt(time.monotonic_ns())
        if self._strategy is None:
            return
        self._recorder.clock.pause()
        self._recorder.evaluate(trainer, pl_module, epoch_is_over=True)
        self._write(trainer, finished=False)
        self._recorder.clock.resume()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record and the timeline; every rank contributes."""
        strategy = self._strategy
        if strategy is None:
            return
        if trainer.is_global_zero:
            self._note(strategy, self._recorder.clock.total_s)
        self._write(trainer, finished=True)
        if self.trace is None or self._spans is None:
            return
        recordings = strategy.gather_objects(self._spans.recording)
        if self._updates is not None:
            assert self._folder is not None
            path = self._folder / self.trace
            write_trace(path, recordings, self._updates, strategy.configuration)
            rank_zero_info(f"The timeline is in {path}; open it in https://ui.perfetto.dev.")
        self._forget()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the record of a run that ends early."""
        self._write(trainer, finished=False)
        self._forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the trainer."""
        self._forget()
        self._strategy = None

    def _forget(self) -> None:
        if self._strategy is not None and self._observe in self._strategy.observers:
            self._strategy.observers.remove(self._observe)
        self._spans = self._updates = None

    def _observe(self, update: Update, tickets: tuple[int, ...]) -> None:
        assert self._updates is not None
        self._updates.add(update.push.worker, update.staleness, update.parked_s, update.applied, update.at_ns)

    def _note(self, strategy: AsyncStrategy, wall_s: float) -> None:
        stats = strategy.stats.counts()
        total, count = self._loss.take()
        self._recorder.series.add(
            Point(
                seconds=round(stats["train_seconds"], 4),
                wall_seconds=round(wall_s, 4),
                updates=stats["updates"],
                staleness_sum=sum(age * count for age, count in stats["staleness"].items()),
                loss=total / count if count and math.isfinite(total) else None,
            )
        )

    def _write(self, trainer: Trainer, finished: bool) -> None:
        if self._strategy is None or self._folder is None or not trainer.is_global_zero:
            return
        self._recorder.record(trainer, finished).write(self._folder / RECORD_NAME)
        self._written_s = self._recorder.clock.total_s
