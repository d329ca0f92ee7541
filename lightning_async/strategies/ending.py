"""What rank 0 says when a fit ends, and how it ends when something has failed already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.loops.progress_bar import end_live_bars
from lightning_async.monitoring.stats import RunStats
from lightning_async.monitoring.summary import print_summary
from lightning_async.strategies.protocols import FitMonitor

__all__ = ["FitEnding", "do_each"]

log = logging.getLogger(__name__)

_HINT = "For a report of a run: Trainer(callbacks=[lightning_async.AsyncMonitor()]), then `lightning-async report`."


class FitEnding:
    """Says and leaves what is known of a fit at its end, once, whether it has come to its end or not.

    Args:
        trainer: the trainer.
        stats: the run's statistics.
        configuration: tells how the run exchanges gradients.
        monitors: what leaves something of the fit.
        wants_table: tells whether rank 0 prints a table.
        finish_metrics: hands what is left to the loggers.
    """

    def __init__(
        self,
        trainer: Trainer,
        stats: RunStats,
        configuration: Callable[[], Mapping[str, Any]],
        monitors: Sequence[FitMonitor],
        wants_table: Callable[[], bool],
        finish_metrics: Callable[[], None],
    ) -> None:
        self._trainer = trainer
        self._stats = stats
        self._configuration = configuration
        self._monitors = monitors
        self._wants_table = wants_table
        self._finish_metrics = finish_metrics
        self._is_over = False

    def finish(self) -> None:
        """The fit has come to its end."""
        self._is_over = True
        if self._trainer.is_global_zero:
            self._finish_metrics()
            self._say(self._wants_table(), broken_off=False)

    def break_off(self, error: BaseException) -> None:
        """The fit ends with an exception; runs no collective, and raises nothing.

        Args:
            error: the exception.
        """
        if self._is_over:
            return
        self._is_over = True
        self._stats.end_segment()
        steps: list[Callable[[], object]] = [partial(monitor.break_off, error) for monitor in self._monitors]
        if self._trainer.is_global_zero:
            # A failure's own words are not to be buried under a table.
            with_table = self._wants_table() and isinstance(error, (KeyboardInterrupt, SIGTERMException))
            steps += [partial(self._say, with_table, broken_off=True), self._finish_metrics]
        do_each(steps)

    def _say(self, with_table: bool, broken_off: bool) -> None:
        end_live_bars(self._trainer)
        print_end(self._configuration(), self._stats, self._monitors, with_table, broken_off)


def print_end(
    configuration: Mapping[str, Any],
    stats: RunStats,
    monitors: Sequence[FitMonitor],
    with_table: bool,
    broken_off: bool = False,
) -> None:
    """Prints the run's table, if it is wanted and there was an update, and in a last line where its report is.

    Args:
        configuration: the strategy's.
        stats: the run's statistics.
        monitors: what has left something of it.
        with_table: whether the table is wanted; without it, a last line says only where something was left.
        broken_off: whether the fit ends with an exception.
    """
    if with_table:
        print_summary(configuration, stats)
    lines = [monitor.closing_line(broken_off) for monitor in monitors]
    if not monitors and with_table and stats.updates:
        lines = [_HINT]
    for line in filter(None, lines):
        print(line, flush=True)


def do_each(steps: Iterable[Callable[[], object]]) -> None:
    """Does the steps that an exception has left to do; one that fails costs neither the exception nor the others."""
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: PERF203  # each by itself
            with suppress(MemoryError):
                log.warning("lightning_async: at the end of a run that has failed: %r", error)
