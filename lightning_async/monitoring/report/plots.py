"""The report's figures, as SVG that takes its colours from the page. The only module that needs matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_async.monitoring.loggers import staleness_histogram
from lightning_async.monitoring.record import RunRecord
from lightning_async.monitoring.report.wording import metric_names

__all__ = ["Plot", "draw"]

# More validation metrics are in the table.
_MOST_METRICS = 4

# Drawn in these, and then replaced by the page's own, which differ between its light and its dark form.
_COLOURS = {
    "#010203": "var(--ink)",
    "#040506": "var(--faint)",
    "#070809": "var(--one)",
    "#0a0b0c": "var(--two)",
    "#0d0e0f": "var(--three)",
    "#101112": "var(--soft)",
}
_INK, _FAINT, _ONE, _TWO, _THREE, _SOFT = _COLOURS
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of the page.

    Args:
        title: what it shows.
        note: how to read it; one sentence.
        svg: the drawing.
    """

    title: str
    note: str
    svg: str


def draw(record: RunRecord) -> list[Plot]:
    """The figures of a run; those whose numbers it lacks are left out."""
    if record.stats["updates"] == 0:
        return []
    plots = [
        _plot(
            "Staleness",
            "Updates applied between reading parameters and applying the gradient computed at them.",
            _staleness,
            record,
        ),
        _plot(
            "Where the time went",
            "Each rank's training time. Exchange is handing a gradient in and getting parameters; barrier, being held "
            "back so that no gradient becomes too stale.",
            _time,
            record,
        ),
        _plot("Share of the updates", "The dashed line is an equal share.", _share, record),
    ]
    if all(record.step_seconds):
        note = "Computing one update, without waiting: median, and the range of the middle 90 %."
        plots.append(_plot("Step time", note, _steps, record))
    if len(record.series) > 1:
        plots.append(_plot("Updates a second", "Over all ranks; validation left out.", _speed, record))
        note = "Mean over all ranks' updates, against training time."
        plots.append(_plot("Staleness over time", note, _staleness_over_time, record))
    if sum(point.loss is not None for point in record.series) > 1:
        plots.append(_plot("Training loss", "Rank 0's batches, against wall-clock time.", _loss, record))
    validated = [name for name in metric_names(record.evaluations) if name.startswith("val")]
    for name in [name for name in validated if len(_finite(record, name)) > 1][:_MOST_METRICS]:
        note = "At each validation or epoch's end, against wall-clock time."
        plots.append(_plot(name, note, partial(_metric, name=name), record))
    return plots


def _plot(title: str, note: str, paint: Callable[[Axes, RunRecord], None], record: RunRecord) -> Plot:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.9, 3.0), layout="constrained")
        paint(figure.add_subplot(), record)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in _COLOURS.items():
        svg = svg.replace(drawn, shown)
    # The page's style sheet decides on the size.
    svg = re.sub(r'<svg([^>]*?) (?:width|height)="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) (?:width|height)="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return Plot(title, note, svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _staleness(axes: Axes, record: RunRecord) -> None:
    counts, edges = staleness_histogram(Counter(record.stats["staleness"]), max_bins=60)
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    axes.bar(centres, counts / counts.sum(), width=0.9 * width, color=_ONE)
    bound = record.configuration.get("max_staleness")
    if bound is not None and bound <= 1.5 * edges[-1]:
        axes.axvline(bound + 0.5, color=_TWO, linewidth=1.5, linestyle="--", label=f"bound {bound}")
        axes.legend()
    _label(axes, "staleness", "part of the updates")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x", visible=False)


def _time(axes: Axes, record: RunRecord) -> None:
    stats = record.stats
    ranks, seconds = list(stats["updates_by_rank"]), max(stats["train_seconds"], 1e-9)
    parked = np.array([stats["parked_seconds_by_rank"][rank] for rank in ranks]) / seconds
    waited = np.array([stats["wait_seconds_by_rank"][rank] for rank in ranks]) / seconds
    parts = (
        ("computing", np.clip(1.0 - waited, 0.0, 1.0), _ONE),
        ("exchange", np.clip(waited - parked, 0.0, 1.0), _THREE),
        ("barrier", np.clip(parked, 0.0, 1.0), _TWO),
    )
    bottom = np.zeros(len(ranks))
    for name, values, colour in parts:
        axes.bar(ranks, values, bottom=bottom, color=colour, label=name, width=0.7)
        bottom += values
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _label_ranks(axes, "part of the time")
    axes.set_ylim(0.0, 1.0)


def _share(axes: Axes, record: RunRecord) -> None:
    updates = record.stats["updates_by_rank"]
    axes.bar(list(updates), [own / record.stats["updates"] for own in updates.values()], color=_ONE, width=0.7)
    axes.axhline(1.0 / len(updates), color=_INK, linewidth=1.0, linestyle="--")
    _label_ranks(axes, "part of the updates")


def _steps(axes: Axes, record: RunRecord) -> None:
    low, middle, high = (
        1000.0 * np.array([np.quantile(steps, fraction) for steps in record.step_seconds])
        for fraction in (0.05, 0.5, 0.95)
    )
    ranks = np.arange(len(middle))
    axes.bar(ranks, middle, color=_ONE, width=0.7)
    axes.errorbar(ranks, middle, yerr=[middle - low, high - middle], fmt="none", color=_INK, capsize=4, linewidth=1.2)
    _label(axes, "rank", "milliseconds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)


def _speed(axes: Axes, record: RunRecord) -> None:
    seconds, speed = _speeds(
        [0.0, *(point.seconds for point in record.series)], [0, *(point.updates for point in record.series)]
    )
    axes.plot(seconds, speed, color=_ONE, linewidth=1.8)
    axes.set_ylim(bottom=0.0)
    _label(axes, "seconds of training", "updates a second")


def _staleness_over_time(axes: Axes, record: RunRecord) -> None:
    seconds = [0.0, *(point.seconds for point in record.series)]
    updates = [0, *(point.updates for point in record.series)]
    middles, speed = _speeds(seconds, updates)
    # The sum of the ages grows as the updates do, each time by its age.
    _, ages = _speeds(seconds, [0, *(point.staleness_sum for point in record.series)], stretches=len(middles))
    known = speed > 0.0
    axes.plot(middles[known], ages[known] / speed[known], color=_ONE, linewidth=1.8)
    axes.set_ylim(bottom=0.0)
    _label(axes, "seconds of training", "mean staleness")


def _speeds(
    seconds: Sequence[float], updates: Sequence[int], stretches: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Updates a second in stretches of equal length, at most 60, with about ten updates each or more.

    Args:
        seconds: of training, not decreasing.
        updates: so far, at each of them.
        stretches: how many, if not that many.

    Returns:
        The middle of each stretch, and the speed in it.

    Examples:
        >>> middles, speeds = _speeds([0.0, 1.0, 4.0, 4.0], [0, 10, 40, 40])
        >>> middles.tolist(), speeds.tolist()
        ([0.5, 1.5, 2.5, 3.5], [10.0, 10.0, 10.0, 10.0])
    """
    stretches = stretches or min(60, max(2, updates[-1] // 10))
    edges = np.linspace(0.0, seconds[-1], stretches + 1)
    counts = np.interp(edges, seconds, updates)
    return (edges[:-1] + edges[1:]) / 2, np.diff(counts) / max(edges[1], 1e-9)


def _loss(axes: Axes, record: RunRecord) -> None:
    points = [(point.wall_seconds, point.loss) for point in record.series if point.loss is not None]
    seconds, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    axes.plot(seconds, losses, color=_SOFT, linewidth=0.8, label="as it was")
    # A running mean over a twentieth of the run.
    width = max(1, len(losses) // 20)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(seconds[(width - 1) // 2 :][: len(smooth)], smooth, color=_ONE, linewidth=1.8, label="running mean")
        axes.legend()
    _label(axes, "seconds since the start", "loss")


def _metric(axes: Axes, record: RunRecord, name: str) -> None:
    seconds, values = zip(*_finite(record, name), strict=True)
    axes.plot(seconds, values, color=_ONE, linewidth=1.8, marker="o" if len(values) <= 40 else None, markersize=3)
    _label(axes, "seconds since the start", "")


def _finite(record: RunRecord, name: str) -> list[tuple[float, float]]:
    """Wall-clock seconds and values of a metric, where it is a number."""
    return [(point.wall_seconds, value) for point, value in record.curve(name) if math.isfinite(value)]


def _label_ranks(axes: Axes, y: str) -> None:
    _label(axes, "rank", y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x", visible=False)


def _label(axes: Axes, x: str, y: Any) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(length=0)
