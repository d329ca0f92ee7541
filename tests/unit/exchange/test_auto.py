"""What `gradients_per_update="auto"` chooses, by step times alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.exchange.auto import LEAST_GAIN, WARM_UP_STEPS, Choice, choose
from lightning_async.exchange.dial import Dial, RunDial
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.types import Push, Update
from lightning_async.monitoring.cpu_use import CpuUse
from lightning_async.monitoring.stats import RunStats

STEPS = WARM_UP_STEPS - 1
seconds = st.floats(1e-3, 10.0)
ranks = st.integers(2, 32)


@given(mean=seconds, ranks=ranks, noise=st.randoms(use_true_random=False))
def test_ranks_that_are_equal_within_five_percent_stay_with_ddp(mean: float, ranks: int, noise: Any) -> None:
    steps = [[mean * noise.uniform(0.95, 1.05) for _ in range(STEPS)] for _ in range(ranks)]

    choice = choose(steps)

    assert choice is not None
    assert choice.waits_for_all
    assert choice.gradients == ranks
    assert 1.0 <= choice.gain < LEAST_GAIN


@given(mean=seconds, ranks=st.integers(2, 32), factor=st.floats(2.0, 20.0), noise=st.randoms(use_true_random=False))
def test_a_rank_that_takes_twice_as_long_is_not_waited_for(mean: float, ranks: int, factor: float, noise: Any) -> None:
    means = [mean] * (ranks - 1) + [factor * mean]
    steps = [[own * noise.uniform(0.95, 1.05) for _ in range(STEPS)] for own in means]

    choice = choose(steps)

    assert choice is not None
    assert choice.gradients == -(-ranks // 2)
    assert choice.gain == pytest.approx(factor * (ranks - 1 + 1 / factor) / ranks, rel=0.06)


@given(slowest=st.floats(1.0, 50.0), ranks=ranks, update_s=st.floats(0.0, 5.0), busy=st.floats(0.0, 1.0))
def test_a_busy_holder_or_host_never_makes_the_gain_larger(
    slowest: float, ranks: int, update_s: float, busy: float
) -> None:
    steps = [[1.0] * STEPS] * (ranks - 1) + [[slowest] * STEPS]

    free, bound = choose(steps), choose(steps, update_s, busy)

    assert free is not None and bound is not None
    assert bound.gain <= free.gain + 1e-9
    if busy:
        assert bound.gain <= max(1.0, 1.0 / busy)


def test_a_holder_that_takes_all_of_the_time_is_no_reason_to_go_apart() -> None:
    steps = [[0.01] * STEPS] * 3 + [[0.02] * STEPS]

    assert choose(steps, update_s=0.02).waits_for_all  # type: ignore[union-attr]
    assert not choose(steps).waits_for_all  # type: ignore[union-attr]


def test_the_first_steps_and_a_hiccup_count_for_nothing() -> None:
    steady = [[0.02] * STEPS for _ in range(4)]
    steady[1][0], steady[2][1], steady[3][9] = 5.0, 3.0, 1.0

    assert choose(steady).gain == 1.0  # type: ignore[union-attr]


def test_random_steps_gain_what_waiting_for_the_slowest_of_each_round_costs() -> None:
    # Every rank is slow in every fourth round, each in another one.
    steps = [[4.0 if round_ % 4 == rank else 1.0 for round_ in range(2, 42)] for rank in range(4)]

    # All rounds take 4, and a rank's mean step 1.75.
    assert choose(steps).gain == pytest.approx(4 / 1.75, rel=0.05)  # type: ignore[union-attr]


def test_too_few_rounds_are_no_measure() -> None:
    assert choose([[1.0] * STEPS, [1.0] * (WARM_UP_STEPS // 2)]) is None
    assert choose([[], []]) is None


def dial_of(asked: Any = "auto", policy: Any = None, stats: RunStats | None = None, **options: Any) -> RunDial:
    return RunDial(Dial(asked, policy), ExchangeOptions(**options), 4, lambda: stats or RunStats(4))


def after_steps(slow: float, cores_used: float = 0.0) -> RunStats:
    """Statistics of four ranks in lock step, the last of them slow, on a host of four cores."""
    stats = RunStats(4)
    stats.start_segment()
    for step in range(WARM_UP_STEPS):
        for rank, took in enumerate((1.0, 1.0, 1.0, slow)):
            push = Push(rank, 0, step, [], (), samples=1, waited_s=slow - took)
            stats.record(Update(push, step, 0, True, 0.0, at_ns=round(1e9 * (step * slow + took)), took_ns=1000))
    stats.note_cpu_use(dict.fromkeys(range(4), CpuUse("host", 4, cores_used)))
    return stats


def test_what_the_user_has_set_is_in_force_after_the_choice() -> None:
    dial = dial_of(policy="damping", stats=after_steps(4.0), max_staleness=3, on_stale="drop")
    measuring = dial.options

    dial.choice = dial.choose()

    assert (measuring.gradients_per_update, measuring.max_staleness, measuring.on_stale) == (4, 0, "wait")
    options = dial.options
    assert (options.gradients_per_update, options.max_staleness, options.on_stale) == (2, 3, "drop")
    assert measuring.staleness_policy == options.staleness_policy == "damping"
    assert dial.requested == {"gradients_per_update": "auto"}


@pytest.mark.parametrize("asked", [1, 3])
def test_a_number_is_never_changed(asked: int) -> None:
    dial = dial_of(asked, stats=after_steps(4.0))

    assert dial.options.gradients_per_update == asked
    assert dial.steps_to_measure is None
    assert (dial.notice, dial.requested, dial.described, dial.state()) == (None, {}, {}, {})


def test_two_gradients_of_a_rank_under_way_need_a_bound_of_one_even_in_lock_step() -> None:
    assert dial_of(overlap=True).options.max_staleness == 1


def test_ranks_that_use_all_cores_of_their_host_stay_together() -> None:
    assert not dial_of(stats=after_steps(4.0)).choose().waits_for_all  # type: ignore[union-attr]
    assert dial_of(stats=after_steps(4.0, cores_used=0.95)).choose().waits_for_all  # type: ignore[union-attr]


def test_a_choice_is_taken_over_from_a_checkpoint_and_so_is_what_was_measured() -> None:
    first = dial_of(stats=after_steps(4.0))
    undecided = first.state()
    first.choice = first.choose()
    assert first.choice is not None
    decided = first.state()

    second, third = dial_of(), dial_of()
    second.load(undecided)
    third.load(decided)

    assert second.choice is None
    assert third.choice == first.choice._replace(waited_seconds=())
    assert second.choose().step_seconds == first.choice.step_seconds  # type: ignore[union-attr]


def test_a_choice_for_another_number_of_ranks_is_not_taken_over() -> None:
    dial = dial_of()

    dial.load({"auto": Choice(1, 2.0, (1.0, 3.0))._asdict()})

    assert dial.choice is None
    assert dial.steps_to_measure == WARM_UP_STEPS


def test_the_line_says_what_was_measured_and_what_follows() -> None:
    apart, together = dial_of(stats=after_steps(4.0)), dial_of(stats=after_steps(1.1))
    apart.choice, together.choice = apart.choose(), together.choose()

    assert apart.notice == (
        'gradients_per_update="auto": 2 gradients an update for 4 ranks, whose steps take 1.0, 1.0, 1.0 and 4.0 s: an '
        "estimated 3.2 times as fast as in lock step; staleness_policy=from_ddp, so that learning rate and momentum "
        "can be those of DDP."
    )
    assert together.notice == (
        'gradients_per_update="auto": as under DDP, each update is made of a gradient of each of 4 ranks, whose steps '
        "take 1.0, 1.0, 1.0 and 1.1 s: without waiting they would be an estimated 1.07 times as fast, and less than "
        "1.2 is not worth it."
    )
    assert apart.described["auto"]["why"] in apart.notice
    assert apart.unfinished is None
    assert "was over before 24 steps" in (dial_of().unfinished or "")
