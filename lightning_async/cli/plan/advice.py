"""What to make of a forecast: whether to train asynchronously, where it ends, and which settings to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_async.cli.plan.model import Costs, Forecast, forecast
from lightning_async.monitoring.replay import free_bound
from lightning_async.simulation.step_times import StepTimes

__all__ = ["advise"]

# What is not worth the change.
_LITTLE_GAIN = 1.1
# A link or holder that is busier makes workers wait in a queue.
_BUSY = 0.7
_SATURATED = 0.95
_PLAYED_WORKERS, _STEPS = 64, 200


def advise(
    steps: StepTimes,
    focus: Forecast,
    every: Sequence[Forecast],
    costs: Costs,
    gradients_per_update: int,
    bound: int | None,
    rounded: Mapping[str, Costs],
) -> list[str]:
    """A few sentences.

    Args:
        steps: how long the steps of the workers take that the advice is for.
        focus: of these workers.
        every: of all numbers of workers, in their order.
        costs: what a gradient costs besides.
        gradients_per_update: K of the forecasts.
        bound: their staleness bound.
        rounded: the costs with payloads of fewer bytes a value, by wire dtype; empty where nothing is rounded.
    """
    said = [_verdict(focus)]
    if focus.limited_by == "holder" or focus.holder_load > _BUSY:
        said.append(_more_per_update(steps, focus, costs, gradients_per_update))
    if rounded and focus.link_load > _BUSY:
        rates = {
            name: forecast(steps, each, gradients_per_update, bound).gradients_per_s for name, each in rounded.items()
        }
        gains = " and ".join(f'{rate / focus.gradients_per_s:.2f} times with "{name}"' for name, rate in rates.items())
        said.append(
            f"Rank 0's link is {focus.link_load:.0%} busy: "
            f"wire_dtype and parameter_wire_dtype give more gradients, {gains}."
        )
    if focus.workers > 1:
        said.append(_which_bound(steps, focus, costs, gradients_per_update, bound))
    end = next((one for one in every if max(one.holder_load, one.link_load) > _SATURATED), None)
    if end is None:
        said.append(f"Neither holder nor link is full with up to {every[-1].workers:,} workers.")
    else:
        link = "Rank 0's link" if costs.spread == 1 else "The busiest host's link"
        where = "The holder" if end.holder_load >= end.link_load else link
        said.append(f"{where} is full with {end.workers:,} workers: more of them bring no more gradients.")
    return said


def _verdict(focus: Forecast) -> str:
    rates = f"{focus.gradients_per_s:.4g} gradients a second, DDP {focus.lock_step_per_s:.4g}"
    begin = f"{focus.workers:,} workers: {rates}"
    if focus.workers == 1:
        return f"{begin}. One worker has nobody to wait for."
    if focus.gain >= _LITTLE_GAIN:
        return f"{begin}: asynchrony gives {focus.gain:.2f} times as many."
    if focus.gain > 1 / _LITTLE_GAIN and focus.limited_by != "workers":
        return f"{begin}: about as many, since the {_REASONS[focus.limited_by]}."
    if focus.gain > 1 / _LITTLE_GAIN:
        return f"{begin}: about as many. The workers are about equally fast, so asynchrony gains little."
    return f"{begin}: DDP is faster, since the {_REASONS[focus.limited_by]}."


_REASONS = {
    "holder": "holder cannot take so many gradients",
    "link": "busiest link cannot carry so many gradients",
    "bound": "staleness bound makes workers wait",
    "workers": "workers wait for their answers one by one",
}


def _more_per_update(steps: StepTimes, focus: Forecast, costs: Costs, gradients_per_update: int) -> str:
    begin = f"The holder is {focus.holder_load:.0%} busy"
    tried = gradients_per_update
    best = focus
    while tried * 2 <= focus.workers and best.holder_load > _BUSY:
        tried *= 2
        best = forecast(steps, costs, tried)
    more = best.gradients_per_s / focus.gradients_per_s
    if tried == gradients_per_update or (more < _LITTLE_GAIN and best.holder_load > _BUSY):
        return f'{begin}, whatever gradients_per_update is: give it a GPU (holder_device="cuda"), or a smaller model.'
    return f"{begin}: gradients_per_update={tried} gives {more:.2f} times the gradients, at {best.holder_load:.0%}."


def _which_bound(steps: StepTimes, focus: Forecast, costs: Costs, gradients_per_update: int, bound: int | None) -> str:
    if focus.workers <= _PLAYED_WORKERS:
        table = [[steps.draw(worker, number) for number in range(_STEPS)] for worker in range(focus.workers)]
        step_s = sum(map(sum, table)) / (_STEPS * focus.workers)
        exchange_s = focus.waiting / max(1 - focus.waiting, 1e-9) * step_s
        free = free_bound(table, 0.0 if focus.limited_by == "bound" else exchange_s, gradients_per_update)
    else:
        free = forecast(steps, costs, gradients_per_update).max_staleness
    if bound is not None and bound < free and focus.limited_by == "bound":
        return (
            f"The bound of {bound} makes workers wait {focus.waiting:.0%} of their time; max_staleness={free} does not."
        )
    return f"max_staleness={free} makes nobody wait."
