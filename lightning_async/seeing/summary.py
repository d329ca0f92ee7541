"""The short table at the end of a fit. Below `strategy.py`; above `verdict.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich import get_console
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_async.monitor import RunStats, quantile
from lightning_async.seeing.verdict import RunFacts, verdict_line

__all__ = ["print_summary", "summary_table"]


def print_summary(configuration: Mapping[str, Any], stats: RunStats) -> None:
    """Prints the run's table and verdict to the console that Lightning's Rich progress bar uses too.

    Args:
        configuration: the strategy's.
        stats: the run's statistics; nothing is printed if there was no update.
    """
    numbers = stats.as_dict()
    if numbers["updates"] == 0:
        return
    steps = [stats.step_seconds(rank) for rank in numbers["updates_by_rank"]]
    facts = RunFacts.of(configuration, numbers, steps)
    get_console().print(summary_table(numbers, verdict_line(facts)))


def summary_table(stats: Mapping[str, Any], verdict: str) -> RenderableType:
    """A row for each rank, one for all, and the verdict.

    Args:
        stats: ``RunStats.as_dict()`` of a run with updates.
        verdict: a line.
    """
    seconds, updates = stats["train_seconds"], stats["updates"]
    title = f"{updates} updates in {seconds:.1f} s of training: {updates / max(seconds, 1e-9):.1f} a second"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("rank")
    for name in ("updates", "share", "batches", "median step", "waiting", "staleness mean / p95 / max"):
        table.add_column(name, justify="right")
    for rank, own in stats["updates_by_rank"].items():
        step = stats["median_step_seconds_by_rank"][rank]
        table.add_row(
            str(rank),
            str(own),
            f"{own / updates:.0%}",
            str(stats["batches_by_rank"][rank]),
            f"{1000 * step:.1f} ms" if step else "-",
            f"{stats['wait_seconds_by_rank'][rank] / max(seconds, 1e-9):.0%}",
            _staleness(stats["staleness_by_rank"][rank]),
        )
    ranks = len(stats["updates_by_rank"])
    table.add_section()
    waited = sum(stats["wait_seconds_by_rank"].values()) / max(ranks * seconds, 1e-9)
    batches = str(sum(stats["batches_by_rank"].values()))
    table.add_row("all", str(updates), "100%", batches, "", f"{waited:.0%}", _staleness(stats["staleness"]))
    return Group(table, Text(verdict))


def _staleness(counts: Mapping[int, int]) -> str:
    if not counts:
        return "-"
    ages = Counter(counts)
    mean = sum(age * count for age, count in ages.items()) / ages.total()
    return f"{mean:.1f} / {quantile(ages, 0.95)} / {max(ages)}"
