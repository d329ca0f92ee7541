"""The benchmarks' plots, from what they have written to `benchmarks/results`: ``python -m benchmarks.plots``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import load

OURS, THEIRS, THIRD, IDEAL = "#1f6feb", "#d9730d", "#3d9970", "#8a8f98"
# Of the landing page's picture, which stands on the page's own ground: ink, ours, theirs, ideal.
LIGHT = ("#1f2328", "#1f6feb", "#d9730d", "#c3c9d1")
DARK = ("#e6edf3", "#4d94ff", "#f0883e", "#4a5260")


def main() -> None:
    """Draws every plot whose benchmark has been run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Axes, Any], None]] = {
        "scaling": scaling,
        "straggler": straggler,
        "ceiling": ceiling,
        "overhead": overhead,
        "time_to_accuracy": time_to_accuracy,
    }
    for name, draw in plots.items():
        record = load(name)
        if record is None:
            print(f"{name}: not run yet")
            continue
        figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        draw(axes, record["found"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        figure.savefig(out / f"benchmark_{name}.svg", metadata={"Date": None})
        plt.close(figure)
        print(f"{name}: drawn")
    if (record := load("straggler")) is not None:
        for ground, colours in (("light", LIGHT), ("dark", DARK)):
            figure = landing_page(record["found"], colours)
            figure.savefig(out / f"speedup_{ground}.svg", metadata={"Date": None}, transparent=True)
            plt.close(figure)
        print("landing page: drawn")


def scaling(axes: Axes, found: list[dict[str, Any]]) -> None:
    """Speed-up against the number of ranks."""
    largest = max(row["ranks"] for row in found)
    axes.plot([1, largest], [1, largest], color=IDEAL, linestyle="--", label="ideal")
    for name, colour in (("async_amsgrad", OURS), ("ddp", THEIRS)):
        rows = [row for row in found if row["strategy"] == name]
        axes.plot([row["ranks"] for row in rows], [row["speed_up"] for row in rows], "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up")
    axes.grid(alpha=0.3)
    axes.legend()


def straggler(axes: Axes, found: list[dict[str, Any]]) -> None:
    """Batches per second beside what the ranks can do alone."""
    names = ["ideal, each rank alone", "async_amsgrad", "ddp"]
    width = 0.8 / len(names)
    for index, (name, colour) in enumerate(zip(names, (IDEAL, OURS, THEIRS), strict=True)):
        rates = [row["batches_per_second"][name] for row in found]
        bars = axes.bar([place + index * width for place in range(len(found))], rates, width, color=colour, label=name)
        axes.bar_label(bars, fmt="{:.1f}", padding=2)
    axes.set_xticks(
        [place + width for place in range(len(found))], [f"{row['parameters']:,} parameters" for row in found]
    )
    axes.set_ylabel("batches per second")
    axes.margins(y=0.25)
    axes.legend(loc="upper right", ncols=3, frameon=False, fontsize="small")


def landing_page(found: list[dict[str, Any]], colours: tuple[str, str, str, str]) -> Figure:
    """One bar for each strategy and model: batches per second with one slow rank, and what the ranks could do."""
    ink, ours, theirs, ideal = colours
    figure, axes = plt.subplots(figsize=(5.6, 3.0), layout="constrained")
    places: list[float] = []
    names: list[str] = []
    for group, row in enumerate(found):
        rates = row["batches_per_second"]
        most, asynchronous, synchronous = rates["ideal, each rank alone"], rates["async_amsgrad"], rates["ddp"]
        for offset, (name, rate, colour) in enumerate(
            (("async_amsgrad", asynchronous, ours), ("ddp", synchronous, theirs))
        ):
            place = -(group * 2.6 + offset)
            axes.barh(place, most, 0.8, color=ideal, alpha=0.5)
            axes.barh(place, rate, 0.8, color=colour)
            text = f"{rate:.1f}" + (f"   {rate / synchronous:.1f}x" if name != "ddp" else "")
            axes.text(rate - 0.8, place, text, ha="right", va="center", color="white", weight="bold")
            places.append(place)
            names.append(name)
        axes.text(most + 1, -(group * 2.6 + 0.5), f"{row['parameters']:,}\nparameters", va="center", color=ink)
    axes.set_yticks(places, names, color=ink)
    axes.tick_params(axis="both", length=0, colors=ink)
    axes.set_xlabel("batches per second; grey: each rank alone, added up", color=ink)
    axes.set_title("Four ranks, one of them four times slower", color=ink, loc="left", fontsize="medium")
    axes.spines[:].set_visible(False)
    axes.set_xlim(0, max(row["batches_per_second"]["ideal, each rank alone"] for row in found) * 1.2)
    return figure


def ceiling(axes: Axes, found: list[dict[str, Any]]) -> None:
    """Updates per second against the number of workers."""
    styles = {"shm": "o-", "gloo": "s--", "tcp": "s--"}
    colours = {"44K": OURS, "11.2M": THEIRS, "100M": THIRD}
    for size, transport in dict.fromkeys((row["size"], row["transport"]) for row in found):
        rows = [row for row in found if (row["size"], row["transport"]) == (size, transport)]
        axes.plot(
            [row["workers"] for row in rows],
            [row["updates_per_second"] for row in rows],
            styles[transport],
            color=colours[size],
            label=f"{size}, {transport}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("workers")
    axes.set_ylabel("updates per second")
    axes.grid(alpha=0.3)
    axes.legend()


def overhead(axes: Axes, found: list[dict[str, Any]]) -> None:
    """Samples per second over DDP's."""
    width = 0.38
    for offset, name, colour in ((0.0, "async_amsgrad", OURS), (width, "async_amsgrad, holder apart", THIRD)):
        shown = [
            (place, row[name]["samples_per_second"] / row["ddp"]) for place, row in enumerate(found) if name in row
        ]
        bars = axes.bar(
            [place + offset for place, _ in shown], [ratio for _, ratio in shown], width, color=colour, label=name
        )
        axes.bar_label(bars, fmt="{:.3f}", padding=2)
    axes.set_xticks(
        [place + width / 2 for place in range(len(found))],
        [f"{row['model']}\n{row['ranks']} rank(s)" for row in found],
    )
    axes.axhline(1.0, color=THEIRS, label="ddp")
    axes.set_ylabel("samples per second over ddp's")
    axes.margins(y=0.2)
    axes.legend(loc="upper right")


def time_to_accuracy(axes: Axes, found: list[dict[str, Any]]) -> None:
    """Seconds to the accuracy, for each seed."""
    width = 0.38
    for offset, name, colour in ((0.0, "async_amsgrad", OURS), (width, "ddp", THEIRS)):
        reached = [(place, row[name]) for place, row in enumerate(found) if row[name]]
        bars = axes.bar(
            [place + offset for place, _ in reached], [s for _, s in reached], width, color=colour, label=name
        )
        axes.bar_label(bars, fmt="{:.1f}", padding=2)
    axes.set_xticks([place + width / 2 for place in range(len(found))], [f"seed {row['seed']}" for row in found])
    axes.set_ylabel("seconds to the accuracy")
    axes.margins(y=0.25)
    axes.legend(loc="upper right", ncols=2, frameon=False)


if __name__ == "__main__":
    main()
