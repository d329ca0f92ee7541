"""The table of a comparison, as Markdown and CSV. Pure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_async.cli.compare.config import Comparison
from lightning_async.cli.compare.results import Estimate, Summary
from lightning_async.monitoring.tables import text_table

__all__ = ["console_table", "csv_table", "markdown_table", "ratio"]


@dataclass(frozen=True)
class _Column:
    key: str
    heading: str
    value: Callable[[Summary], Estimate | None]
    shown: Callable[[float], str]
    suffix: Callable[[Summary], str] = lambda summary: ""


def ratio(baseline: Estimate | None, own: Estimate | None) -> Estimate | None:
    """How many times as long the baseline takes.

    Args:
        baseline: its duration.
        own: the duration to compare.

    Returns:
        The ratio of the means, without a spread; `None` if one of them was not measured.
    """
    if baseline is None or own is None or own.mean == 0:
        return None
    return Estimate(baseline.mean / own.mean, None, min(baseline.count, own.count))


def markdown_table(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """Write the table for readers.

    Args:
        comparison: says which columns there are.
        summaries: one for each row.

    Returns:
        A table in Markdown, with mean ± standard deviation over the seeds, and a line for each failed run.
    """
    columns = [column for column in _columns(comparison, summaries) if any(map(column.value, summaries))]
    lines = [
        "| " + " | ".join(["variant", "runs", *(column.heading for column in columns)]) + " |",
        "|---|--:|" + "--:|" * len(columns),
    ]
    for summary in summaries:
        cells = [_escaped(summary.variant.name), f"{len(summary.records)} of {summary.runs}"]
        cells += [_cell(column, summary) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [
        f"- {_escaped(summary.variant.name)}, seed {seed}: {reason}"
        for summary in summaries
        for seed, reason in summary.failures.items()
    ]
    if failed:
        lines += ["", "Runs without a result:", "", *failed]
    return "\n".join(lines) + "\n"


def console_table(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """Write what matters most of the table for a terminal.

    Args:
        comparison: says which columns there are.
        summaries: one for each row.

    Returns:
        A title and a table that fits into 80 characters if the names are short.
    """
    keys = ("metric", "updates", "epoch_seconds", "speedup", "target_seconds")
    columns = [
        column for column in _columns(comparison, summaries) if column.key in keys and any(map(column.value, summaries))
    ]
    rows = [
        [
            summary.variant.name,
            f"{len(summary.records)} of {summary.runs}",
            *(_cell(column, summary) for column in columns),
        ]
        for summary in summaries
    ]
    return f"{comparison.title}\n{text_table(['variant', 'runs', *(column.heading for column in columns)], rows)}"


def csv_table(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """Write the table for programs.

    Args:
        comparison: says which columns there are.
        summaries: one for each row.

    Returns:
        Comma-separated values: for each column of the table its mean, its standard deviation and the number of
        seeds that have it; empty where nothing was measured.
    """
    columns = _columns(comparison, summaries)
    axes = list(comparison.axes())
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measured = [f"{column.key}{suffix}" for column in columns for suffix in ("", "_sd", "_runs")]
    writer.writerow(["name", *axes, "runs_finished", "runs_failed", *measured])
    for summary in summaries:
        row: list[object] = [summary.variant.name, *(summary.variant.labels[axis] for axis in axes)]
        row += [len(summary.records), len(summary.failures)]
        for column in columns:
            value = column.value(summary)
            row += ["", "", 0] if value is None else [value.mean, _blank(value.spread), value.count]
        writer.writerow(row)
    return out.getvalue()


def _columns(comparison: Comparison, summaries: Sequence[Summary]) -> list[_Column]:
    columns = [
        _Column("metric", f"{comparison.metric}, last", lambda s: s.metric, _four_digits),
        _Column("best_metric", f"{comparison.metric}, best", lambda s: s.best_metric, _four_digits),
        _Column("loss", f"{comparison.loss}, last", lambda s: s.loss, _four_digits),
        _Column("train_loss", "train loss, last epoch", lambda s: s.train_loss, _four_digits),
        _Column("epochs", "epochs", lambda s: s.epochs, _short),
        _Column("updates", "updates", lambda s: s.updates, lambda value: f"{value:.0f}"),
        _Column("staleness", "staleness, mean", lambda s: s.staleness, _two_digits),
        _Column("batches_per_second", "batches/s", lambda s: s.batches_per_second, _one_digit),
        _Column("epoch_seconds", "s/epoch", lambda s: s.epoch_seconds, _two_digits),
    ]
    baseline = next((s for s in summaries if s.variant.name == comparison.baseline), None)
    if baseline is not None:
        columns.append(_Column("speedup", "speed-up", lambda s: ratio(baseline.epoch_seconds, s.epoch_seconds), _times))
    if comparison.target is None:
        return columns
    columns.append(
        _Column(
            "target_seconds",
            f"s to {comparison.metric} {comparison.target:g}",
            lambda s: s.target_seconds,
            _one_digit,
            lambda s: "" if s.target_seconds is None or s.target_seconds.count == len(s.records) else _how_many(s),
        )
    )
    if baseline is not None:
        columns.append(
            _Column(
                "target_speedup",
                f"speed-up to {comparison.target:g}",
                lambda s: ratio(baseline.target_seconds, s.target_seconds),
                _times,
            )
        )
    return columns


def _cell(column: _Column, summary: Summary) -> str:
    value = column.value(summary)
    if value is None:
        return "not reached" if column.key == "target_seconds" and summary.records else "–"
    if math.isnan(value.mean):
        return "diverged"
    # A spread that rounds to nothing says nothing, as with the number of epochs.
    spread = "" if not value.spread or value.spread < 1e-9 else f" ± {column.shown(value.spread)}"
    return column.shown(value.mean) + spread + column.suffix(summary)


def _how_many(summary: Summary) -> str:
    assert summary.target_seconds is not None
    return f" ({summary.target_seconds.count} of {len(summary.records)} runs)"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _blank(value: float | None) -> object:
    return "" if value is None else value


def _short(value: float) -> str:
    return f"{value:.3g}"


def _one_digit(value: float) -> str:
    return f"{value:.1f}"


def _two_digits(value: float) -> str:
    return f"{value:.2f}"


def _four_digits(value: float) -> str:
    return f"{value:.4f}"


def _times(value: float) -> str:
    return f"{value:.2f}x"
