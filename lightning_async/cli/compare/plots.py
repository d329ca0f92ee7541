"""The pictures of a comparison. The only module of `compare` that needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_async.cli.compare.config import Comparison, Plot
from lightning_async.cli.compare.plan import joined
from lightning_async.cli.compare.results import Summary
from lightning_async.cli.compare.tables import ratio
from lightning_async.monitoring.series import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_matplotlib", "draw", "mean_curve"]

_MARKERS = "osD^vPX*"
# Paul Tol's bright scheme, without its grey: told apart by colour-blind readers too.
_COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#000000")

_Style = dict[str, Any]
_Reading = Callable[[Evaluation], float | None]


def check_matplotlib() -> None:
    """Find out before a long training whether its pictures can be drawn.

    Raises:
        ValueError: with what to install.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error


def draw(comparison: Comparison, summaries: Sequence[Summary], folder: Path) -> list[Path]:
    """Draw the plots that the comparison asks for.

    Args:
        comparison: says which.
        summaries: what was measured; variants without a finished run are left out.
        folder: where the PNG files go.

    Returns:
        The files, in the order of the plots.
    """
    measured = [summary for summary in summaries if summary.records]
    files = []
    for plot in comparison.plots or [Plot()]:
        for part, members in _parts(comparison, plot, measured):
            figure = _DRAWERS[plot.kind](comparison, plot, members)
            title = ": ".join(filter(None, [plot.title or comparison.title, part]))
            figure.suptitle(title, fontsize=12)
            files.append(folder / f"{_file_name(plot, part)}.png")
            figure.savefig(files[-1], dpi=130)
    return files


def mean_curve(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """Average curves point by point.

    Args:
        runs: for each seed its points (x, y), in order; a shorter run ends the average.

    Returns:
        For each point the mean x, and mean, smallest and largest y.

    Examples:
        >>> mean_curve([[(1.0, 2.0), (2.0, 5.0)], [(3.0, 4.0)]])
        [(2.0, 3.0, 2.0, 4.0)]
    """
    curve = []
    for points in zip(*runs, strict=False):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        curve.append((statistics.fmean(xs), statistics.fmean(ys), min(ys), max(ys)))
    return curve


def _draw_curves(comparison: Comparison, plot: Plot, summaries: Sequence[Summary]) -> Figure:
    rows: list[tuple[str, _Reading]] = [
        ("train loss", lambda point: point.train_loss),
        (comparison.loss, lambda point: point.metrics.get(comparison.loss)),
        (comparison.metric, lambda point: point.metrics.get(comparison.metric)),
    ]
    columns: list[tuple[str, _Reading]] = [
        ("epoch", lambda point: point.epoch),
        ("updates", lambda point: point.updates),
        ("seconds of training", lambda point: point.seconds),
    ]
    figure = _figure(11.0, 8.6)
    grid = figure.subplots(len(rows), len(columns), sharey="row", squeeze=False)
    styles = _styles(plot, comparison, summaries)
    for row, (y_label, y) in enumerate(rows):
        for column, (x_label, x) in enumerate(columns):
            axes: Axes = grid[row][column]
            for summary, style in zip(summaries, styles, strict=True):
                _draw_curve(axes, summary, x, y, {**style, "label": _label(summary, {plot.separate})})
            axes.grid(alpha=0.3)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=6, integer=x_label != "seconds of training")
            if column == 0:
                axes.set_ylabel(y_label)
            if row == len(rows) - 1:
                axes.set_xlabel(x_label)
        if "loss" in y_label:
            _scale_loss(grid[row], summaries, y)
        elif comparison.target is not None:
            for axes in grid[row]:
                axes.axhline(comparison.target, color="0.5", linewidth=1, linestyle=":")
    _legend_below(figure, grid[0][0])
    return figure


def _draw_curve(axes: Axes, summary: Summary, x: _Reading, y: _Reading, style: _Style) -> None:
    runs = [
        [
            (x_value, y_value)
            for point in record.evaluations
            if (x_value := x(point)) is not None and (y_value := y(point)) is not None
        ]
        for record in summary.records.values()
    ]
    curve = mean_curve(runs)
    if not curve:
        return
    xs, means, lows, highs = zip(*curve, strict=True)
    axes.plot(xs, means, linewidth=1.5, **style)
    if len(runs) > 1:
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)


def _draw_final(comparison: Comparison, plot: Plot, summaries: Sequence[Summary]) -> Figure:
    figure = _figure(7.0, 4.6)
    axes = figure.subplots()
    for index, (name, members) in enumerate(_series(comparison, plot, summaries)):
        known = [(_x(plot, summary), summary.metric) for summary in members if summary.metric is not None]
        axes.errorbar(
            [x for x, _ in known],
            [value.mean for _, value in known],
            [value.spread or 0.0 for _, value in known],
            label=name,
            capsize=3,
            **_series_style(index),
        )
    _finish_against(axes, plot, summaries)
    axes.set_ylabel(f"{comparison.metric} after training")
    _legend_below(figure, axes)
    return figure


def _draw_speedup(comparison: Comparison, plot: Plot, summaries: Sequence[Summary]) -> Figure:
    figure = _figure(7.0, 4.6)
    axes = figure.subplots()
    baseline = next((summary for summary in summaries if summary.variant.name == comparison.baseline), None)
    for index, (name, members) in enumerate(_series(comparison, plot, summaries)):
        reference = baseline or members[0]
        known = [(_x(plot, summary), ratio(reference.epoch_seconds, summary.epoch_seconds)) for summary in members]
        axes.plot(
            [x for x, value in known if value is not None],
            [value.mean for _, value in known if value is not None],
            label=name,
            **_series_style(index),
        )
    _finish_against(axes, plot, summaries)
    axes.set_ylim(bottom=0)
    one = baseline.variant.name if baseline else f"each line's smallest {plot.against}"
    axes.axhline(1.0, color="0.5", linewidth=1, linestyle=":", label=f"1x: {one}")
    axes.set_ylabel("speed-up in epochs per second")
    _legend_below(figure, axes)
    return figure


_DRAWERS: Mapping[str, Callable[[Comparison, Plot, Sequence[Summary]], Figure]] = {
    "curves": _draw_curves,
    "final": _draw_final,
    "speedup": _draw_speedup,
}


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, which keeps figures and looks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _parts(comparison: Comparison, plot: Plot, summaries: Sequence[Summary]) -> Iterator[tuple[str, list[Summary]]]:
    """What goes into each picture of a plot, with the name of the part."""
    if plot.separate is None:
        if summaries:
            yield "", list(summaries)
        return
    for variant in comparison.axes()[plot.separate]:
        members = [summary for summary in summaries if summary.variant.labels[plot.separate] == variant.name]
        if members:
            yield variant.name if isinstance(variant.name, str) else f"{plot.separate} {variant.name}", members


def _series(comparison: Comparison, plot: Plot, summaries: Sequence[Summary]) -> Iterator[tuple[str, list[Summary]]]:
    """The lines of a plot against an axis: one for each combination of the other axes, in the order of x."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(_label(summary, {plot.against, plot.separate}), []).append(summary)
    for name, members in groups.items():
        yield name or comparison.metric, sorted(members, key=lambda summary: _x(plot, summary))


def _x(plot: Plot, summary: Summary) -> float:
    assert plot.against is not None
    return float(summary.variant.labels[plot.against])


def _styles(plot: Plot, comparison: Comparison, summaries: Sequence[Summary]) -> list[_Style]:
    """A style for each line of the curves: in the order of an axis if one is named, else one colour each."""
    dashes = ["-", "--", ":", "-."]
    if plot.against is None:
        return [
            {"color": _COLORS[index % len(_COLORS)], "linestyle": dashes[index // len(_COLORS) % len(dashes)]}
            for index in range(len(summaries))
        ]
    from matplotlib import colormaps

    names = [variant.name for variant in comparison.axes()[plot.against]]
    # The map's last tenth is too light to be seen on white.
    shades = [colormaps["viridis"](0.9 * index / max(1, len(names) - 1)) for index in range(len(names))]
    others = [_label(summary, {plot.against, plot.separate}) for summary in summaries]
    distinct = list(dict.fromkeys(others))
    return [
        {
            "color": shades[names.index(summary.variant.labels[plot.against])],
            "linestyle": dashes[distinct.index(other) % len(dashes)],
        }
        for summary, other in zip(summaries, others, strict=True)
    ]


def _label(summary: Summary, without: set[str | None]) -> str:
    """A variant's name without the axes that the picture shows otherwise."""
    return joined({axis: label for axis, label in summary.variant.labels.items() if axis not in without})


def _series_style(index: int) -> _Style:
    color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.5}


def _scale_loss(row: Sequence[Axes], summaries: Sequence[Summary], y: _Reading) -> None:
    values = [
        value
        for s in summaries
        for record in s.records.values()
        for point in record.evaluations
        if (value := y(point)) is not None
    ]
    # Losses that fall by orders of magnitude are told apart on a logarithmic axis only.
    if values and min(values) > 0 and max(values) > 10 * min(values):
        for axes in row:
            axes.set_yscale("log")


def _finish_against(axes: Axes, plot: Plot, summaries: Sequence[Summary]) -> None:
    xs = sorted({_x(plot, summary) for summary in summaries})
    positive = [x for x in xs if x > 0]
    if positive and positive[-1] > 16 * positive[0]:
        # Linear up to the smallest, so that zero has a place.
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.set_xlabel(str(plot.against))
    axes.grid(alpha=0.3)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=1)
    # About 14 characters, with their line, to an inch.
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 14 / (longest + 8))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _file_name(plot: Plot, part: str) -> str:
    words = [plot.name or "-".join(filter(None, [plot.kind, "by" if plot.against else "", plot.against])), part]
    return "-".join("".join(c if c.isalnum() else "-" for c in word).strip("-").lower() for word in words if word)
