"""The diagnosis follows from the numbers, and the replay behind it from the holder's own rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async.monitoring.cpu_use import CpuUse
from lightning_async.monitoring.diagnosis import RunFacts, conclusions, diagnosis_line, slow_ranks
from lightning_async.monitoring.replay import free_bound, replay
from lightning_async.monitoring.stats import RunStats

FAST, SLOW, NOISY = [0.002] * 20, [0.0082] * 20, [0.001, 0.002, 0.009] * 7
FACTS = RunFacts(
    max_staleness=16,
    on_stale="wait",
    shared=True,
    train_seconds=10.0,
    updates=15_500,
    dropped=0,
    steps=[FAST, FAST, FAST, SLOW],
    wait_seconds=[0.5] * 4,
    parked_seconds=[0.0] * 4,
    all_reduce_s=1e-4,
    cpu=[CpuUse("a", 8, 0.9)] * 4,
)


@given(
    steps=st.lists(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4), min_size=1, max_size=6),
    bound=st.integers(0, 20),
)
@settings(max_examples=40, deadline=None)
def test_a_replay_keeps_the_bound_and_waits_only_for_it(steps: list[list[float]], bound: int) -> None:
    bounded, free = replay(steps, bound, 60), replay(steps, None, 60)

    assert all(60 <= played.staleness.total() < 60 + len(steps) for played in (bounded, free))
    assert max(bounded.staleness) <= bound
    assert 0.0 <= bounded.parked_fraction <= 1.0
    assert free.parked_fraction == 0.0


def test_a_replay_without_a_bound_goes_as_fast_as_its_ranks() -> None:
    assert replay([[1.0], [0.5]], None, updates=300).seconds == pytest.approx(100.0, abs=1.0)


def test_the_free_bound_is_the_smallest_that_costs_nothing() -> None:
    steps = [[1.0], [1.0], [1.0], [4.1]]
    bound = free_bound(steps)

    assert replay(steps, bound, 1000).parked_fraction < 0.005
    assert replay(steps, bound - 1, 1000).parked_fraction >= 0.005


def test_a_slow_rank_is_one_that_the_others_are_not() -> None:
    assert slow_ranks(FACTS.steps) == {3: pytest.approx(4.1)}
    assert slow_ranks([FAST, SLOW]) == {1: pytest.approx(4.1)}
    assert slow_ranks([FAST, [0.0029] * 20]) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parked_seconds": [0.2, 0.2, 0.2, 0.2]}, "the barrier cost 2% of worker time"),
        ({"parked_seconds": [0.04] * 4}, "the barrier cost 0.4% of worker time"),
        ({}, "the barrier cost nothing"),
        ({"max_staleness": None}, "no bound was set, so nothing waited for it"),
        ({"max_staleness": 100}, "would not cost more, and gradients would be fresher"),
        ({"max_staleness": 1}, "a bound of 1 lets only 2 of 4 ranks compute at a time"),
        ({"max_staleness": 4, "parked_seconds": [2.0] * 4}, "the barrier cost 20% of worker time; a bound of"),
        (
            {"on_stale": "drop", "dropped": 15_500, "max_staleness": 4},
            "50% of the gradients were dropped as too stale; a",
        ),
        ({"on_stale": "drop"}, "0.0% of the gradients were dropped as too stale"),
        ({"wait_seconds": [4.0] * 4}, "took 40% of worker time: rank 0 or the transport is the bottleneck"),
        ({"steps": [FAST] * 4}, "the ranks are about equally fast"),
        ({"steps": [FAST] * 3 + [[0.01]]}, "rank 3 made too few steps to tell how fast it is; the barrier cost"),
        ({"steps": [FAST] * 2 + [[], [0.01]], "max_staleness": None}, "ranks 2 and 3 made too few steps"),
        ({"steps": [[0.01]] * 4}, "too few steps on each rank to say anything"),
        ({"shared": False, "updates": 4800}, "the slowest rank sets the pace, as in lock step: batches='shared' would"),
        ({"shared": False, "steps": [FAST] * 4}, "the ranks are about equally fast"),
        ({"train_seconds": 0.0, "wait_seconds": [4.0] * 4}, "took 100% of worker time"),
        ({"steps": [FAST] * 2 + [SLOW] * 2}, "ranks 2 and 3 take 4.1x the median step of the others; "),
        ({"steps": [FAST], "wait_seconds": [0.0], "parked_seconds": [0.0]}, "a single rank"),
        ({"updates": 0}, "no update was applied"),
        ({"cpu": ()}, "what lock step would take is not known, since the run ended before its ranks met"),
        (
            {"cpu": [CpuUse("a", 2, 0.5)] * 4, "steps": [NOISY, NOISY[1:], NOISY[2:], NOISY]},
            "ranks wait for cores, with 4 ranks on 2 cores, so what lock step would take cannot be told",
        ),
        ({"cpu": [CpuUse("a", 2, 0.02)] * 4}, "an estimated 3.2x as long (4 ranks on 2 cores)"),
        (
            {"cpu": [CpuUse("a", 2, 0.1)] * 4, "wait_seconds": [4.0] * 4},
            "took 40% of worker time: with 4 ranks on 2 cores a part of that is waiting for a core",
        ),
    ],
)
def test_the_diagnosis_says(changes: dict[str, object], said: str) -> None:
    assert said in "; ".join(conclusions(replace(FACTS, **changes)))  # type: ignore[arg-type]


def test_the_diagnosis_names_slow_rank_barrier_and_gain_in_one_line() -> None:
    line = diagnosis_line(replace(FACTS, max_staleness=6, parked_seconds=[0.2] * 4))

    assert line == (
        f"Rank 3 takes 4.1x the median step of the others; the barrier cost 2% of worker time; a bound of "
        f"{free_bound(FACTS.steps)} would cost none; in lock step the same batches would take an estimated 3.2x as "
        "long."
    )


def test_many_slow_ranks_are_one_sentence() -> None:
    steps = [[0.01] * 20] * 48 + [[0.04 + 0.001 * rank] * 20 for rank in range(16)]

    slow = [sentence for sentence in conclusions(replace(FACTS, steps=steps)) if "median step" in sentence]

    assert slow == ["ranks 48 to 63 take 4.0 to 5.5x the median step of the others"]


def test_a_rank_that_is_a_thousand_times_slower_is_waited_for_by_a_smaller_bound() -> None:
    steps = [[0.001] * 20] * 2 + [[1.0] * 20]

    assert 1900 <= free_bound(steps) <= 2000


def test_equally_fast_ranks_are_not_told_of_a_slow_one() -> None:
    assert not any("median step" in sentence for sentence in conclusions(replace(FACTS, steps=[FAST] * 4)))


def test_ranks_that_wait_for_each_other_as_under_ddp_do_so_by_intent() -> None:
    facts = replace(FACTS, max_staleness=0, gradients_per_update=4, wait_seconds=[7.0, 7.0, 7.0, 0.1])

    assert conclusions(facts) == [
        "rank 3 takes 4.1x the median step of the others",
        "each update waited for a gradient of every rank, as under DDP: 53% of worker time went into that and the "
        "exchange",
    ]


def test_a_run_that_was_partly_in_lock_step_is_told_what_was_measured_there() -> None:
    facts = replace(FACTS, gradients_per_update=2, max_staleness=8, gain_measured=2.24, apart_from=24)

    assert conclusions(facts)[-1] == (
        "up to version 24 the ranks were measured in lock step, in which the rest would take an estimated 2.2x as long"
    )


@pytest.mark.parametrize(("gradients", "waited"), [(2, [0.5] * 4), (4, [3.5] * 4)], ids=["apart", "together"])
def test_what_ranks_waited_while_auto_measured_is_no_fault_of_the_exchange(gradients: int, waited: list[float]) -> None:
    stats = RunStats(4)
    for rank in range(4):
        stats.wait_seconds_by_rank[rank] = 3.5
    configuration = {"max_staleness": 8, "on_stale": "wait", "batches": "shared", "gradients_per_update": gradients}
    chosen = {"gradients": gradients, "waited_seconds": [3.0] * 4}

    assert RunFacts.of({**configuration, "auto": chosen}, stats.as_dict(), FACTS.steps).wait_seconds == waited
    assert RunFacts.of(configuration, stats.as_dict(), FACTS.steps).wait_seconds == [3.5] * 4
