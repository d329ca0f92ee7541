"""The estimate of lock step is close to what is right, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async.monitoring.cpu_use import CpuMeter, CpuUse
from lightning_async.monitoring.lock_step import estimate
from lightning_async.monitoring.run_facts import RunFacts

EVEN, UNEVEN = [[0.01] * 50] * 4, [[0.01] * 50] * 3 + [[0.04] * 50]


def facts(
    steps: list[list[float]], cores: int, used: float, wait_s: float = 0.0, all_reduce_s: float = 1e-6
) -> RunFacts:
    """Ten seconds of ranks that never wait for one another, on one host."""
    rate = sum(len(own) / sum(own) for own in steps)
    return RunFacts(
        max_staleness=16,
        on_stale="wait",
        shared=True,
        train_seconds=10.0,
        updates=round((10.0 - wait_s) * rate),
        dropped=0,
        steps=steps,
        wait_seconds=[wait_s] * len(steps),
        parked_seconds=[0.0] * len(steps),
        all_reduce_s=all_reduce_s,
        cpu=[CpuUse("a", cores, used)] * len(steps),
    )


def test_with_a_core_each_a_round_takes_what_its_slowest_rank_takes() -> None:
    assert estimate(facts(UNEVEN, cores=8, used=1.0)).factor == pytest.approx(3.25, rel=1e-3)
    assert estimate(facts(EVEN, cores=8, used=1.0)).factor == pytest.approx(1.0, rel=1e-3)
    assert estimate(facts([[1.0, 3.0], [3.0, 1.0]], cores=8, used=1.0)).factor == pytest.approx(1.5, rel=1e-3)


def test_ranks_that_sleep_on_few_cores_are_as_on_hardware_of_their_own() -> None:
    found = estimate(facts(UNEVEN, cores=2, used=0.02))

    assert found.known
    assert found.factor == pytest.approx(3.25, rel=0.05)


def test_ranks_that_share_cores_evenly_gain_nothing() -> None:
    found = estimate(facts(EVEN, cores=2, used=0.5))

    assert found.low == pytest.approx(1.0, rel=1e-3)
    assert found.known


def test_waiting_for_a_core_is_not_taken_for_slow_steps() -> None:
    # Each computes 5 ms; for some steps it waits for a core as long again, for some three times as long.
    own = [0.005, 0.01, 0.02] * 20
    found = estimate(facts([own, own[1:], own[2:], own], cores=2, used=0.5))

    assert found.low == pytest.approx(1.0, abs=0.1)
    assert found.high > 1.5
    assert not found.known


def test_hosts_with_cores_enough_are_not_touched_by_one_that_has_too_few() -> None:
    run = facts(UNEVEN, cores=8, used=1.0)
    crowded = replace(run, cpu=[CpuUse("a", 1, 0.5)] * 2 + [CpuUse("b", 8, 1.0)] * 2)

    assert estimate(crowded).factor == pytest.approx(3.25, rel=1e-3)
    assert crowded.shared_cores() == [(2, 1)]


def test_an_all_reduce_is_a_part_of_each_step() -> None:
    found = estimate(facts(EVEN, cores=8, used=1.0, all_reduce_s=0.002))

    assert found.known
    assert found.factor == pytest.approx(1.2, abs=0.02)


def test_an_all_reduce_that_takes_longer_than_the_steps_leaves_little_to_tell() -> None:
    assert not estimate(facts(EVEN, cores=8, used=1.0, all_reduce_s=0.04)).known


def test_nothing_is_known_of_ranks_that_did_not_tell_what_they_used() -> None:
    assert not estimate(replace(facts(EVEN, cores=8, used=1.0), cpu=())).known
    assert not estimate(replace(facts(EVEN, cores=8, used=1.0), all_reduce_s=0.0)).known


@given(
    steps=st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=30), min_size=2, max_size=5),
    cores=st.integers(1, 8),
    used=st.floats(0.0, 1.0),
)
@settings(max_examples=100, deadline=None)
def test_the_least_is_at_most_the_most(steps: list[list[float]], cores: int, used: float) -> None:
    found = estimate(facts(steps, cores, min(used, cores / len(steps))))

    assert 0.0 < found.low <= found.high * (1 + 1e-9)


def test_the_meter_counts_only_what_lies_between_start_and_stop() -> None:
    meter = CpuMeter()
    assert meter.stop().used == 0.0
    sum(range(2_000_000))
    meter.start()
    use = meter.stop()

    assert use.host
    assert use.cores >= 1
    # One core cannot do more than one core's work, whatever was computed before.
    assert 0.0 <= use.used < 1000.0
    assert meter.stop() == use
