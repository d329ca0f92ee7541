"""The forecast agrees with what the barrier's own replay, plain arithmetic and the definition of lock step say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async.cli.plan.model import Costs, forecast
from lightning_async.monitoring.replay import replay
from lightning_async.simulation.step_times import StepTimes

ONE_SLOW = [1.0, 1.0, 1.0, 4.0]


@given(
    means=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6),
    gradients_per_update=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_without_costs_it_is_the_replay_of_the_steps(means: list[float], gradients_per_update: int) -> None:
    steps = StepTimes.of([{"mean": mean, "spread": 0.1, "distribution": "lognormal"} for mean in means])
    workers = len(means)

    found = forecast(steps, Costs(), gradients_per_update)

    table = [[steps.draw(worker, number) for number in range(500)] for worker in range(workers)]
    expected = replay(table, None, 6000, gradients_per_update=gradients_per_update)
    assert found.gradients_per_s == pytest.approx(expected.staleness.total() / expected.seconds, rel=0.05)
    # Whoever the workers are, between two gradients of one come on average those of all others.
    assert found.mean_staleness == pytest.approx((workers - 1) / gradients_per_update, rel=0.1, abs=0.1)
    assert found.limited_by == "workers"


@pytest.mark.parametrize("bound", [1, 3, 6])
def test_a_bound_costs_what_the_barrier_costs(bound: int) -> None:
    steps = StepTimes.of(ONE_SLOW)

    found = forecast(steps, Costs(), bound=bound)

    expected = replay([[step] for step in ONE_SLOW], bound, 2000)
    assert found.gradients_per_s == pytest.approx(expected.staleness.total() / expected.seconds, rel=0.03)
    assert (found.limited_by, found.max_staleness) == ("bound", bound)


def test_a_bound_that_many_workers_reach_limits_them_to_its_versions_in_the_slowest_step() -> None:
    found = forecast(StepTimes.of(ONE_SLOW, workers=400), Costs(), bound=9)

    assert found.gradients_per_s == pytest.approx(10 / 4.0)
    assert (found.limited_by, found.max_staleness) == ("bound", 9)


def test_a_full_holder_takes_what_it_can_and_several_gradients_an_update_relieve_it() -> None:
    costs = Costs(gather_s=0.01, update_s=0.03)

    one, four = (forecast(StepTimes.of([0.1], workers=64), costs, count) for count in (1, 4))

    assert one.gradients_per_s == pytest.approx(1 / 0.04, rel=0.01)
    assert four.gradients_per_s == pytest.approx(4 / (4 * 0.01 + 0.03), rel=0.01)
    assert (one.limited_by, round(one.holder_load, 2)) == ("holder", 1.0)


def test_several_gradients_an_update_cost_the_holder_the_adding_of_each() -> None:
    costs = Costs(gather_s=0.01, mean_s=0.005, update_s=0.03)

    one, four = (forecast(StepTimes.of([0.1], workers=64), costs, count) for count in (1, 4))

    assert one.gradients_per_s == pytest.approx(1 / 0.04, rel=0.01)
    assert four.gradients_per_s == pytest.approx(4 / (4 * 0.015 + 0.03), rel=0.01)


def test_parts_of_a_holder_share_what_grows_with_the_model() -> None:
    whole, parts = (Costs.of(parameters=100e6, shards=shards) for shards in (1, 4))

    assert parts.update_s == whole.update_s / 4 and parts.mean_s == whole.mean_s / 4
    # And each gradient's messages cost what they did, and a little more.
    assert whole.gather_s / 4 < parts.gather_s < whole.gather_s / 3


def test_a_full_link_carries_what_it_can_and_rank_0_does_not_use_it() -> None:
    costs = Costs.of(parameters=1e6, bytes_per_s=125e6, gather_s=0.0, update_s=0.0)

    many, alone = (forecast(StepTimes.of([0.1], workers=count), costs) for count in (64, 1))

    assert costs.gradient_s == pytest.approx(0.032)
    # And those of rank 0, which computes on.
    assert many.gradients_per_s == pytest.approx(1 / 0.032 + 10, rel=0.02)
    assert many.limited_by == "link"
    assert alone.gradients_per_s == pytest.approx(10)


def test_shards_on_several_hosts_share_what_passes_a_full_link() -> None:
    steps = StepTimes.of([0.01], workers=64)
    found = [forecast(steps, Costs(gradient_s=0.1, parameters_s=0.1, spread=shards)) for shards in (1, 2, 4)]

    # Rank 0's own gradients pass no link where the holder is whole, and it makes a hundred a second.
    whole, *parts = (one.gradients_per_s - 100 for one in found)
    assert all(one.limited_by == "link" for one in found)
    # Of 64 hosts' gradients 63/64 pass rank 0's link, and where each of four hosts has a part 1/4 + 1/64 - 2/256.
    assert [part / whole for part in parts] == pytest.approx([1.97, 3.82], rel=0.15)


def test_lock_step_waits_for_the_slowest_and_for_the_exchange() -> None:
    found = forecast(StepTimes.of(ONE_SLOW), Costs(all_reduce_s=0.4, latency_s=0.01))

    assert 4 / found.lock_step_per_s == pytest.approx(4.0 + 0.4 * 3 / 4 + 4 * 0.01)


def test_a_hundred_thousand_workers_are_played() -> None:
    found = forecast(StepTimes.of([1.0, 4.0], workers=100_000), Costs())

    assert found.gradients_per_s == pytest.approx(62_500, rel=0.02)
