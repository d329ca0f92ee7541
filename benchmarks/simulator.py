"""The simulated cluster beside real runs: throughput, and how far apart the distributions of staleness are.

Run ``python -m benchmarks.simulator``. A real run of each cluster gives the steps of its ranks and the seconds of an
exchange, with which it is simulated. So are settings under which ranks wait or gradients are dropped, told from that
same run: they are trained with afterwards. Ranks sleep, as on hardware of their own.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import lightning_async
from benchmarks.emulated import LENET5_PARAMETERS, Step, measure
from benchmarks.record import save
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.staleness import resolve_max_staleness
from lightning_async.monitoring.run_facts import RunFacts
from lightning_async.simulation import ExchangeTimes, StepTimes, play

SLOW = [Step(sleep_s=0.02)] * 3 + [Step(sleep_s=0.08)]
CLUSTERS: dict[str, list[Step]] = {
    "4 ranks, one 4x slower": SLOW,
    "4 equal ranks": [Step(sleep_s=0.02)] * 4,
    "4 ranks, noisy": [Step(sleep_s=0.02, noise=0.5)] * 4,
    "16 equal ranks": [Step(sleep_s=0.05)] * 16,
}
# The first one of each cluster is what the others are told from.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "4 ranks, one 4x slower": [
        {},
        {"max_staleness": 2},
        {"max_staleness": 1, "gradients_per_update": 2},
        {"max_staleness": 0, "gradients_per_update": 4},
        {"max_staleness": 3, "on_stale": "drop"},
    ],
    "4 ranks, noisy": [{}, {"max_staleness": 0, "gradients_per_update": 4}],
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long each run lasts")
    parser.add_argument("--only", default="", help="clusters whose name contains this")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("cluster and setting                                    batches/s  simulated  ratio  distance of staleness")
    found = [
        row
        for name, steps in CLUSTERS.items()
        if arguments.only in name
        for row in compare(name, steps, SETTINGS.get(name, [{}]), arguments.seconds)
    ]
    save("simulator", vars(arguments), found)


def compare(name: str, steps: list[Step], settings: Sequence[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """One cluster's settings, printed and returned."""
    rows: list[dict[str, Any]] = []
    rate = sum(1 / step.sleep_s for step in steps)
    told_from: RunFacts | None = None
    for setting in settings:
        if told_from is not None:
            rate, _ = simulate(told_from, setting, 1000)
        batches = max(200, int(rate * seconds))
        make = functools.partial(lightning_async.AsyncAMSGradStrategy, start_method="fork", **setting)
        real = measure(make, steps, batches, LENET5_PARAMETERS, with_facts=True)
        told_from = told_from or real["facts"]
        per_second, staleness = simulate(told_from, setting, batches)
        # Without what comes before the first batch and after the last one.
        measured = batches / real["facts"].train_seconds
        row = {
            "cluster": name,
            "setting": setting,
            "measured": measured,
            "simulated": per_second,
            "ratio": per_second / measured,
            "distance": distance(real["staleness"], staleness),
        }
        rows.append(row)
        text = ", ".join(f"{key}={value}" for key, value in setting.items()) or "as it comes"
        print(
            f"{name + ': ' + text:<64}{row['measured']:>8.1f} {row['simulated']:>9.1f} {row['ratio']:>6.2f} "
            f"{row['distance']:>10.2f}",
            flush=True,
        )
    return rows


def simulate(facts: RunFacts, setting: Mapping[str, Any], batches: int) -> tuple[float, Counter[int]]:
    """Batches per second and staleness that a run's steps and exchanges lead to under a setting.

    Args:
        facts: of the run.
        setting: the strategy's arguments.
        batches: to play.
    """
    made = facts.updates + facts.dropped
    exchange = max(0.0, sum(facts.wait_seconds) - sum(facts.parked_seconds)) / made
    k = setting.get("gradients_per_update", 1)
    bound = resolve_max_staleness(setting.get("max_staleness", "auto"), facts.ranks, k)
    barrier = StalenessBarrier(bound, setting.get("on_stale", "wait"), gradients_per_update=k)
    # How much of an exchange is the holder's work is not known; where it is not busy, that makes no difference.
    times = ExchangeTimes(push=exchange / 2, pull=exchange / 2)
    cluster, sink = play(StepTimes.of(facts.steps), barrier, batches, times)
    return batches / cluster.progress.now, sink.staleness


def distance(first: Mapping[int, int], second: Mapping[int, int]) -> float:
    """Total variation between two distributions: 0 if they are the same, 1 if they have nothing in common.

    Examples:
        >>> distance({0: 1, 1: 1}, {0: 10}), distance({0: 1}, {3: 7})
        (0.5, 1.0)
    """
    one, other = (Counter(counts) for counts in (first, second))
    ages = {*one, *other}
    return sum(abs(one[age] / one.total() - other[age] / other.total()) for age in ages) / 2


if __name__ == "__main__":
    main()
