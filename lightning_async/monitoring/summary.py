"""The short table at the end of a fit."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_async.monitoring.diagnosis import RunFacts, diagnosis_line
from lightning_async.monitoring.stats import RunStats, staleness_text
from lightning_async.monitoring.tables import printable, text_table

__all__ = ["print_summary", "summary_table"]

# Columns that a narrow terminal goes without, in this order.
_DISPENSABLE = ("rejected", "batches", "share", "waiting", "median step")


def print_summary(configuration: Mapping[str, Any], stats: RunStats) -> None:
    """Prints the run's table and diagnosis to stdout; no live progress bar may be there then.

    Args:
        configuration: the strategy's.
        stats: the run's statistics; nothing is printed if there was no gradient, and no table if none was applied.
    """
    numbers = stats.as_dict()
    if not numbers["updates"] and not numbers["rejected"]:
        return
    steps = [stats.step_seconds(rank) for rank in numbers["updates_by_rank"]]
    facts = RunFacts.of(configuration, numbers, steps)
    width = shutil.get_terminal_size().columns
    if not numbers["updates"]:
        print(printable("\n".join(textwrap.wrap(diagnosis_line(facts), width))), flush=True)
        return
    table = summary_table(numbers, diagnosis_line(facts), width, facts.gradients_per_update)
    print(printable(table), flush=True)


def summary_table(stats: Mapping[str, Any], diagnosis: str, width: int = 80, gradients_per_update: int = 1) -> str:
    """A row for each rank, one for all, and the diagnosis.

    Args:
        stats: ``RunStats.as_dict()`` of a run with updates.
        diagnosis: a line; it is wrapped.
        width: characters of a line. A narrow terminal gets fewer columns: a number that is cut off says nothing.
        gradients_per_update: with more than one, what each rank has made is called gradients.
    """
    counted = "updates" if gradients_per_update == 1 else "gradients"
    columns = _columns(stats, counted)
    table = _table(columns)
    for name in _DISPENSABLE:
        if len(table.partition("\n")[0]) <= width:
            break
        if columns.pop(name, None) is None:
            continue
        table = _table(columns)
    seconds, updates = stats["train_seconds"], stats["updates"]
    made = counted if gradients_per_update == 1 else f"{counted}, {gradients_per_update} an update,"
    title = f"{updates} {made} in {seconds:.1f} s of training: {updates / max(seconds, 1e-9):.1f} a second"
    return "\n".join([*textwrap.wrap(title, width), table, *textwrap.wrap(diagnosis, width)])


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    *ranks, all_of_them = zip(*columns.values(), strict=True)
    return text_table(list(columns), ranks, total=all_of_them)


def _columns(stats: Mapping[str, Any], counted: str) -> dict[str, list[str]]:
    seconds, updates = max(stats["train_seconds"], 1e-9), stats["updates"]
    own, batches, waited = stats["updates_by_rank"], stats["batches_by_rank"], stats["wait_seconds_by_rank"]
    steps, rejected = stats["median_step_seconds_by_rank"], stats["rejected_by_rank"]
    spoiled = {"rejected": [*(str(rejected[rank]) for rank in own), str(stats["rejected"])]}
    return {
        "rank": [*map(str, own), "all"],
        counted: [*map(str, own.values()), str(updates)],
        "share": [*(f"{count / updates:.0%}" for count in own.values()), "100%"],
        "batches": [*(str(batches[rank]) for rank in own), str(sum(batches.values()))],
        **(spoiled if stats["rejected"] else {}),
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
