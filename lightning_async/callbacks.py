"""`AsyncMonitor`: a callback that leaves a record, a report and a timeline of the run."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_async.monitoring.record import RECORD_NAME
from lightning_async.monitoring.record_file import RecordFile
from lightning_async.monitoring.timeline import Timeline
from lightning_async.runtime.failure import describe_error
from lightning_async.strategies.script_launcher import ScriptLauncher
from lightning_async.strategies.strategy import AsyncStrategy

__all__ = ["AsyncMonitor"]

log = logging.getLogger(__name__)


class AsyncMonitor(Callback):
    """Leaves what a run did: a record for ``lightning-async report``, and a timeline for ui.perfetto.dev.

    The files lie in ``trainer.log_dir``, which is ``default_root_dir`` without a logger, or in ``folder``. The record,
    ``async_run.json``, is kept up to date while the run goes on: every five seconds, or more seldom where that would
    take 0.5 % of the time. Record and timeline are also there after Ctrl+C and after a failure, then with what rank 0
    knows. All are bounded in size and memory. Under a strategy of another kind the callback does nothing.

    Args:
        trace: name of the timeline's file, for instance ``"run.json"``; None for no timeline. A relative name is
            relative to the folder.
        summary: whether rank 0 prints a short table at the end of fit; None leaves it to the strategy's argument.
        folder: where the files go; None for the trainer's folder.
        trace_spans: the most spans of each rank in the timeline (a step has five or six); 29 bytes each while the run
            lasts and about 110 in the file. Later ones are counted in the file's metadata.
        report: whether rank 0 writes ``report.html`` beside the record when the run ends, which needs matplotlib and
            some seconds. Where ranks are spawned or forked, a run that fails leaves it to ``lightning-async report``.

    Raises:
        MisconfigurationException: if an argument has no meaning, or if the folder is not a local one.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AsyncMonitor(trace="run.json")], logger=False)
    """

    def __init__(
        self,
        trace: str | None = None,
        summary: bool | None = None,
        folder: str | Path | None = None,
        trace_spans: int = 200_000,
        report: bool = False,
    ) -> None:
        if trace_spans < 1:
            raise MisconfigurationException(f"trace_spans must be at least 1, not {trace_spans}.")
        self.trace = trace
        self.summary = summary
        self.folder = folder
        self.trace_spans = trace_spans
        self.report = report
        self._folder: Path | None = None
        # While a fit is under way.
        self._strategy: AsyncStrategy | None = None
        self._record: RecordFile | None = None
        self._timeline: Timeline | None = None
        self._ended_by: str | None = None
        self._tells = True

    def leave_the_last_line(self) -> None:
        """Leaves it to the program to write a report and to say where it is; called before the fit."""
        self._tells, self.report = False, False

    @property
    def record_path(self) -> Path | None:
        """Where the record is, on rank 0 once a fit has begun to train; None if there is none."""
        path = None if self._folder is None else self._folder / RECORD_NAME
        return path if path is not None and path.exists() else None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, AsyncStrategy):
            rank_zero_info(f"AsyncMonitor has nothing to do under {type(trainer.strategy).__name__}.")
            return
        self._strategy = trainer.strategy
        if self.summary is not None:
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
        assert self._folder is not None
        self._record, self._ended_by = RecordFile(trainer, self._folder, strategy.stats), None
        if self not in strategy.monitors:
            strategy.monitors.append(self)
        if self.trace is None:
            return
        ranks = strategy.world_size if trainer.is_global_zero else None
        self._timeline = Timeline(self.trace_spans, lambda: strategy.version, ranks)
        strategy.worker.on_span = self._timeline.add
        if trainer.is_global_zero:
            strategy.observers.append(self._timeline.observe)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the time."""
        if self._timeline is not None:
            self._timeline.on_train_batch_start(batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time and the loss and, on rank 0, where the run stands."""
        if self._timeline is not None:
            self._timeline.on_train_batch_end()
        if self._record is not None:
            self._record.on_train_batch_end(outputs)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the stretch of training."""
        if self._timeline is not None:
            self._timeline.on_validation_start()
        if self._record is not None:
            self._record.on_validation_start()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds what validation has found."""
        if self._timeline is not None:
            self._timeline.on_validation_end()
        if self._record is not None:
            self._record.on_validation_end(pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds what is known at the epoch's end."""
        if self._timeline is not None:
            self._timeline.on_train_epoch_end()
        if self._record is not None:
            self._record.on_train_epoch_end(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record and the timeline; every rank contributes."""
        strategy, timeline = self._strategy, self._timeline
        if strategy is None or self._record is None:
            return
        self._record.finish()
        if timeline is not None:
            recordings = strategy.gather_objects(timeline.recording)
            if trainer.is_global_zero:
                timeline.write(self._trace_path, recordings, strategy.configuration)
        self._stop_looking()

    def break_off(self, error: BaseException) -> None:
        """Writes the record and the timeline of a fit that ends with an exception: what rank 0 knows by itself."""
        strategy = self._strategy
        if strategy is None or self._record is None or not strategy.is_global_zero:
            return
        self._ended_by = describe_error(error)
        self._record.finish(self._ended_by)
        if not self._is_told_of_exceptions:
            self._write_timeline_alone(self._ended_by)

    def closing_line(self, broken_off: bool) -> str | None:
        """Where the files are; writes the report, if it is wanted and there is time for it."""
        folder = self._folder
        if self._strategy is None or folder is None or (broken_off and self._is_told_of_exceptions):
            return None
        return self._lines(folder, may_write=not broken_off)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what takes its time of a fit that has ended early; the record is there."""
        ended_by, self._ended_by = self._ended_by, None
        if ended_by is not None and self._is_told_of_exceptions and self._folder is not None:
            try:
                self._write_timeline_alone(ended_by)
                if lines := self._lines(self._folder, may_write=True):
                    print(lines, flush=True)
            except Exception as error:
                # Lightning would raise it in the place of what has ended the fit.
                log.warning("lightning_async: the timeline or the report could not be written: %r", error)
        self._stop_looking()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the trainer."""
        self._stop_looking()
        if self._strategy is not None and self in self._strategy.monitors:
            self._strategy.monitors.remove(self)
        self._strategy = self._record = None

    @property
    def _trace_path(self) -> Path:
        assert self._folder is not None and self.trace is not None
        return self._folder / self.trace

    def _stop_looking(self) -> None:
        strategy, timeline, self._timeline = self._strategy, self._timeline, None
        if strategy is not None and timeline is not None and timeline.observe in strategy.observers:
            strategy.observers.remove(timeline.observe)

    @property
    def _is_told_of_exceptions(self) -> bool:
        """Whether `on_exception` comes: then a failed run's process has got away from what ends it soon."""
        return self._strategy is not None and isinstance(self._strategy.launcher, ScriptLauncher)

    def _write_timeline_alone(self, ended_by: str) -> None:
        if self._timeline is not None and self._strategy is not None:
            self._timeline.write_alone(self._trace_path, self._strategy.configuration, ended_by)

    def _lines(self, folder: Path, may_write: bool) -> str | None:
        timeline = (
            f"Timeline of the run: {self._trace_path}; open it in https://ui.perfetto.dev." if self.trace else None
        )
        report = self._report_line(folder, may_write) if self._tells else None
        return "\n".join(filter(None, (timeline, report))) or None

    def _report_line(self, folder: Path, may_write: bool) -> str:
        if not (self.report and may_write):
            command = f"lightning-async report {shlex.quote(str(folder))}"
            return f"Record of the run: {folder}; `{command}` makes a page of it."
        # It draws, with a library that is of no use to a training rank.
        from lightning_async.monitoring.record import RecordError
        from lightning_async.monitoring.report import ReportError, write_report

        try:
            return f"Report of the run: {write_report(folder)}"
        except (RecordError, ReportError, OSError) as error:
            return f"Record of the run: {folder}. There is no report: {error}."
