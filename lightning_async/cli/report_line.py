"""The record that every fit of the command line leaves, and its last line: where the report is."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from typing_extensions import Self

from lightning_async.callbacks import AsyncMonitor
from lightning_async.cli.compare.recorder import RunRecorder
from lightning_async.cli.requirements import is_installed
from lightning_async.monitoring.record import RECORD_NAME
from lightning_async.strategies.strategy import AsyncStrategy

__all__ = ["ReportAtTheEnd", "add_monitor", "report_line"]


def add_monitor(trainer: Trainer) -> None:
    """Add an `AsyncMonitor` to an asynchronous run that has none, so that it leaves a record.

    Args:
        trainer: of the run, before its fit. A run that leaves nothing by intent is left alone: `fast_dev_run`,
            `barebones`, results in a remote folder; and one of `compare`, which has a record already.
    """
    callbacks = _callbacks(trainer)
    leaves_nothing = bool(trainer.fast_dev_run) or trainer.barebones or "://" in str(_folder(trainer))  # type: ignore[attr-defined]
    if not isinstance(trainer.strategy, AsyncStrategy) or leaves_nothing:
        return
    if any(isinstance(callback, (AsyncMonitor, RunRecorder)) for callback in callbacks):
        return
    # Lightning has put checkpoints last, and what they save in order.
    place = next((i for i, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)), len(callbacks))
    callbacks.insert(place, AsyncMonitor(summary=trainer.strategy.summary))


class ReportAtTheEnd:
    """Says in a program's last line where the report of its fit is, however the fit has ended; on rank 0.

    A context manager around the program. Nothing is said of a fit that has left no record.
    """

    def __init__(self) -> None:
        self._record: Path | None = None
        self._before_ns = 0

    def expect(self, trainer: Trainer) -> None:
        """Takes note of where a fit, which begins, leaves its record.

        Args:
            trainer: of the fit.
        """
        monitor = next((callback for callback in _callbacks(trainer) if isinstance(callback, AsyncMonitor)), None)
        if monitor is None or not trainer.is_global_zero:
            return
        monitor.leave_the_last_line()
        folder = _folder(trainer) if monitor.folder is None else monitor.folder
        self._record = Path(folder) / RECORD_NAME
        self._before_ns = self._written_ns()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._record is None:
            return
        if kind is None or issubclass(kind, SystemExit):
            self._say()
            return
        # The interpreter shows the traceback when the program has been left.
        show = sys.excepthook

        def show_and_say(*what: Any) -> None:
            sys.excepthook = show
            show(*what)
            self._say()

        sys.excepthook = show_and_say

    def _say(self) -> None:
        if self._record is not None and self._written_ns() > self._before_ns:
            print(report_line(self._record.parent), flush=True)

    def _written_ns(self) -> int:
        return self._record.stat().st_mtime_ns if self._record is not None and self._record.exists() else 0


def report_line(folder: Path) -> str:
    """Write a run's report where it can be drawn; say where it is, or what draws it.

    Args:
        folder: with the record of the run.

    Returns:
        One line.
    """
    with contextlib.suppress(ValueError):
        # The logger's folder is an absolute one, which is long.
        folder = folder.relative_to(Path.cwd())
    command = f"lightning-async report {shlex.quote(str(folder))}"
    if not is_installed("matplotlib"):
        return f"report: pip install matplotlib, then {command}"
    try:
        # Imported when it is called: what it needs to draw is of no use to a training rank.
        report: Any = importlib.import_module("lightning_async.monitoring.report")
        return f"report: {report.write_report(folder)}"
    # The run is over, whatever becomes of its report.
    except Exception as error:
        return f"no report: {type(error).__name__}: {error}; try {command}"


def _callbacks(trainer: Trainer) -> list[Any]:
    # Set by a connector.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _folder(trainer: Trainer) -> str:
    """What `trainer.log_dir` will be; that is a collective call, and the ranks have not been started.

    A logger that numbers its folders takes its number now, and spawned ranks get the logger with it.
    """
    logger: Logger | None = trainer.logger
    folder = logger.log_dir if isinstance(logger, (CSVLogger, TensorBoardLogger)) else logger and logger.save_dir
    return str(folder or trainer.default_root_dir)
