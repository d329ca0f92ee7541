"""Ranks on two hosts beside the same ranks on one: batches per second of each strategy, with one slow rank.

Run ``python -m benchmarks.hosts`` as root, on Linux: the hosts are network namespaces with a rate limit by tbf between
them. Half of the ranks are on each. Step times are emulated by sleeping, so that hosts that share this machine's cores
do not take them from each other.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from statistics import median
from typing import Any, Literal

from benchmarks.emulated import LENET5_PARAMETERS, measure
from benchmarks.network import Link
from benchmarks.record import save
from lightning_async import AsyncAMSGradStrategy

__all__ = ["STRATEGIES", "link_bound"]

_FORK: dict[str, Any] = {"start_method": "fork"}


def _overlapping(wire: Literal["bf16", "int8"]) -> Any:
    return partial(
        AsyncAMSGradStrategy,
        **_FORK,
        overlap=True,
        max_staleness=64,
        wire_dtype=wire,
        parameter_wire_dtype=wire,
    )


STRATEGIES: dict[str, Any] = {
    "async_amsgrad": partial(AsyncAMSGradStrategy, **_FORK),
    # With overlap a slow rank's gradient is two of its steps old, which "auto" has no room for.
    "overlap": partial(AsyncAMSGradStrategy, **_FORK, overlap=True, max_staleness=64),
    **{f"overlap, {wire}": _overlapping(wire) for wire in ("bf16", "int8")},
    "ddp": "ddp_fork",
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[50, 50, 50, 200], help="step time of each rank")
    parser.add_argument("--parameters", type=int, nargs="+", default=[LENET5_PARAMETERS, 1_000_000])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--megabits", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each run takes")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    step_s = [milliseconds / 1000 for milliseconds in arguments.step_ms]
    found = []
    print(f"step times {arguments.step_ms} ms, {arguments.megabits:g} Mbit/s; medians of {arguments.turns}")
    print("parameters  strategy       one host  two hosts  of one host  the link allows   load")
    for parameters in arguments.parameters:
        bound = link_bound(step_s, parameters, arguments.megabits)
        for name in arguments.strategies:
            row = compare(name, step_s, parameters, arguments)
            row["link_bound"] = bound if name == "overlap" else None
            found.append(row)
            allowed = "" if row["link_bound"] is None else f"{bound:.1f}"
            print(
                f"{parameters:>10,}  {name:<13} {row['one_host']:>9.1f} {row['two_hosts']:>10.1f}"
                f" {row['of_one_host']:>12.3f} {allowed:>16} {row['load']:>6.1f}",
                flush=True,
            )
    save("hosts", vars(arguments), found)


def link_bound(step_s: list[float], parameters: int, megabits: float) -> float:
    """Batches per second that ranks make at best with overlap, if those of the second host share the link.

    A rank's push and pull may take as long as its step, and no longer.

    Examples:
        >>> link_bound([0.05, 0.05, 0.05, 0.2], 1_000_000, 1000.0)
        60.625
        >>> round(link_bound([0.05, 0.05, 0.05, 0.2], 1_000_000, 100.0), 1)
        43.1
    """
    half = len(step_s) // 2
    payloads_per_s = megabits * 1e6 / 8 / (4 * parameters)
    here = sum(1 / one for one in step_s[:half])
    there = sum(min(1 / one, payloads_per_s / 2) for one in step_s[half:])
    return here + min(there, payloads_per_s)


def compare(name: str, step_s: list[float], parameters: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of one strategy's batches per second on one host and on two, measured in turns."""
    rate = len(step_s) / max(step_s) if name == "ddp" else sum(1 / one for one in step_s)
    batches = int(rate * arguments.seconds)
    rates: dict[str, list[float]] = {"one_host": [], "two_hosts": []}
    loads = []
    for _ in range(arguments.turns):
        loads.append(os.getloadavg()[0])
        rates["one_host"].append(measure(STRATEGIES[name], step_s, batches, parameters)["batches_per_second"])
        link = Link()
        link.limit(arguments.megabits)
        there = measure(STRATEGIES[name], step_s, batches, parameters, link=link)
        if (carried := min(link.carried_bytes())) < batches * parameters // 10:
            raise RuntimeError(
                f"{name}: {carried / 1e6:.0f} MB went each way: these hosts have another way to each other"
            )
        rates["two_hosts"].append(there["batches_per_second"])
        link.close()
    one, two = median(rates["one_host"]), median(rates["two_hosts"])
    ratio = median(there / here for here, there in zip(rates["one_host"], rates["two_hosts"], strict=True))
    return {
        "parameters": parameters,
        "strategy": name,
        "one_host": one,
        "two_hosts": two,
        "of_one_host": ratio,
        "load": median(loads),
    }


if __name__ == "__main__":
    main()
