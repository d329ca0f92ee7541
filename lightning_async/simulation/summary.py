"""The table at the end of a simulated run."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning_async.monitoring.stats import RunStats, staleness_text
from lightning_async.monitoring.tables import text_table
from lightning_async.simulation.cluster import Progress

__all__ = ["ROWS", "cluster_table"]

# Workers that have a row of their own.
ROWS = 8


def cluster_table(stats: RunStats, progress: Progress, version: int, width: int = 80) -> str:
    """Throughput, staleness and waiting of a simulated run; the first 8 workers have rows of their own.

    Args:
        stats: of the run, with gradients taken.
        progress: how far its cluster has come.
        version: updates that were made.
        width: characters of a line of text.
    """
    counts = stats.counts()
    gradients, seconds = counts["updates"], counts["train_seconds"]
    workers = list(range(len(progress.steps)))
    shown = workers if len(workers) <= ROWS + 1 else workers[:ROWS]
    groups = [(str(worker), [worker]) for worker in shown]
    if len(shown) < len(workers):
        groups.append((f"{len(workers) - ROWS} others", workers[ROWS:]))
    rows = [_row(name, members, counts, progress) for name, members in groups]
    dropped = f", {counts['dropped']} dropped as too stale" if counts["dropped"] else ""
    dropped += f", {counts['rejected']} rejected as not finite" if counts["rejected"] else ""
    title = (
        f"{gradients} gradients{dropped} and {version} updates in {seconds:.4g} virtual seconds: "
        f"{gradients / max(seconds, 1e-12):.4g} gradients a second; the holder is busy {progress.load:.0%} of the time"
    )
    headings = ["worker", "gradients", "share", "mean step", "waiting", "staleness\nmean / p95 / max"]
    table = text_table(headings, rows, total=_row("all", workers, counts, progress))
    return "\n".join([*textwrap.wrap(title, width), table])


def _row(name: str, members: Sequence[int], counts: dict[str, Any], progress: Progress) -> list[str]:
    gradients = sum(counts["updates_by_rank"][worker] for worker in members)
    everyones = sum(counts["updates_by_rank"].values())
    steps = sum(progress.steps[worker] for worker in members)
    computing = sum(progress.computing[worker] for worker in members)
    staleness: Counter[int] = Counter()
    for worker in members:
        staleness.update(counts["staleness_by_rank"][worker])
    return [
        name,
        str(gradients),
        f"{gradients / max(everyones, 1):.0%}",
        f"{computing / steps:.4g} s" if steps else "-",
        f"{sum(map(progress.waiting, members)) / len(members):.0%}",
        staleness_text(staleness),
    ]
