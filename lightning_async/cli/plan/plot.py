"""The forecasts as a figure. The only module here that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lightning_async.cli.plan.model import Forecast

__all__ = ["draw"]


def draw(forecasts: Sequence[Forecast], path: Path) -> None:
    """Writes rates, and what workers, holder and link do with their time, over the number of workers.

    Args:
        forecasts: in the order of their numbers of workers.
        path: ends in ``.png``, ``.svg`` or ``.pdf``.
    """
    workers = [one.workers for one in forecasts]
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    rates, shares = figure.subplots(2, 1, sharex=True)
    rates.plot(workers, [one.gradients_per_s for one in forecasts], "o-", label="asynchronous")
    rates.plot(workers, [one.lock_step_per_s for one in forecasts], "s--", label="DDP")
    rates.set_ylabel("gradients a second")
    rates.set_xscale("log")
    rates.set_yscale("log")
    for label, values, style in (
        ("holder busy", [one.holder_load for one in forecasts], "o-"),
        ("rank 0's link busy", [one.link_load for one in forecasts], "^-"),
        ("workers waiting", [one.waiting for one in forecasts], "x--"),
    ):
        shares.plot(workers, [100 * value for value in values], style, label=label)
    shares.set_ylim(-3, 103)
    shares.set_ylabel("% of the time")
    shares.set_xlabel("workers")
    for axes in (rates, shares):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
