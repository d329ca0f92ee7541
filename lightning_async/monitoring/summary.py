"""The short table at the end of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import get_console
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lightning_async.monitoring.diagnosis import RunFacts, diagnosis_line
from lightning_async.monitoring.stats import RunStats, staleness_text

__all__ = ["print_summary", "summary_table"]

# Columns that a narrow terminal goes without, in this order.
_DISPENSABLE = ("batches", "share", "waiting", "median step")


def print_summary(configuration: Mapping[str, Any], stats: RunStats) -> None:
    """Prints the run's table and diagnosis to the console that Lightning's Rich progress bar uses too.

    Args:
        configuration: the strategy's.
        stats: the run's statistics; nothing is printed if there was no update.
    """
    numbers = stats.as_dict()
    if numbers["updates"] == 0:
        return
    steps = [stats.step_seconds(rank) for rank in numbers["updates_by_rank"]]
    facts = RunFacts.of(configuration, numbers, steps)
    get_console().print(summary_table(numbers, diagnosis_line(facts)))


def summary_table(stats: Mapping[str, Any], diagnosis: str) -> RenderableType:
    """A row for each rank, one for all, and the diagnosis.

    Args:
        stats: ``RunStats.as_dict()`` of a run with updates.
        diagnosis: a line.
    """
    return Group(_Ranks(stats), Text(diagnosis))


class _Ranks:
    """The table, without the columns that a narrow terminal has no room for: a number that is cut off says nothing."""

    def __init__(self, stats: Mapping[str, Any]) -> None:
        self._stats = stats

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = _columns(self._stats)
        table = _table(self._stats, columns)
        for name in _DISPENSABLE:
            if Measurement.get(console, options.update(width=10_000), table).maximum <= options.max_width:
                break
            columns.pop(name)
            table = _table(self._stats, columns)
        yield table


def _table(stats: Mapping[str, Any], columns: Mapping[str, Sequence[str]]) -> Table:
    seconds, updates = stats["train_seconds"], stats["updates"]
    title = f"{updates} updates in {seconds:.1f} s of training: {updates / max(seconds, 1e-9):.1f} a second"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name == "rank" else "right", no_wrap=True)
    *ranks, all_of_them = zip(*columns.values(), strict=True)
    for row in ranks:
        table.add_row(*row)
    table.add_section()
    table.add_row(*all_of_them)
    return table


def _columns(stats: Mapping[str, Any]) -> dict[str, list[str]]:
    seconds, updates = max(stats["train_seconds"], 1e-9), stats["updates"]
    own, batches, waited = stats["updates_by_rank"], stats["batches_by_rank"], stats["wait_seconds_by_rank"]
    steps = stats["median_step_seconds_by_rank"]
    return {
        "rank": [*map(str, own), "all"],
        "updates": [*map(str, own.values()), str(updates)],
        "share": [*(f"{count / updates:.0%}" for count in own.values()), "100%"],
        "batches": [*(str(batches[rank]) for rank in own), str(sum(batches.values()))],
        "median step": [*(f"{1000 * steps[rank]:.1f} ms" if steps[rank] else "-" for rank in own), ""],
        "waiting": [
            *(f"{waited[rank] / seconds:.0%}" for rank in own),
            f"{sum(waited.values()) / (len(own) * seconds):.0%}",
        ],
        "staleness\nmean / p95 / max": [
            *(staleness_text(stats["staleness_by_rank"][rank]) for rank in own),
            staleness_text(stats["staleness"]),
        ],
    }
