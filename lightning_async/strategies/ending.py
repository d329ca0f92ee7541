"""What rank 0 says when a fit ends, and how it ends when something has failed already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning_async.monitoring.stats import RunStats
from lightning_async.monitoring.summary import print_summary
from lightning_async.strategies.protocols import FitMonitor

__all__ = ["do_each", "print_end"]

log = logging.getLogger(__name__)

_HINT = "For a report of a run: Trainer(callbacks=[lightning_async.AsyncMonitor()]), then `lightning-async report`."


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
