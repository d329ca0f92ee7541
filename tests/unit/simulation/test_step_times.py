"""Step times: what is drawn, from what descriptions, and what is refused."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.monitoring.record import RECORD_NAME, RecordError, RunRecord
from lightning_async.monitoring.stats import RunStats
from lightning_async.simulation.step_times import StepTime, StepTimes

DISTRIBUTIONS: list[dict[str, Any]] = [
    {"distribution": "constant"},
    {"distribution": "normal", "spread": 0.3},
    {"distribution": "lognormal", "spread": 1.5},
    {"distribution": "uniform", "spread": 0.5},
    {"distribution": "exponential"},
    {"distribution": "exponential", "spread": 0.25},
]


def record(folder: Path, steps: list[list[float]]) -> Path:
    configuration = {"max_staleness": 4, "on_stale": "wait", "batches": "shared", "gradients_per_update": 1}
    stats = RunStats(workers=len(steps)).as_dict()
    run = RunRecord("AsyncStrategy", len(steps), 1, True, "now", (), configuration, stats, steps)
    run.write(folder / RECORD_NAME)
    return folder


@given(seed=st.integers(-(2**70), 2**70), worker=st.integers(0, 3), number=st.integers(0, 10**9))
def test_a_draw_depends_on_seed_worker_and_number_only(seed: int, worker: int, number: int) -> None:
    spec = [{"mean": 2.0, **distribution} for distribution in DISTRIBUTIONS]
    first, second = (StepTimes.of(spec, seed=seed) for _ in range(2))

    for other in range(5):
        second.draw(other, number + other)

    assert first.draw(worker, number) == second.draw(worker, number) >= 0.0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_the_draws_have_the_mean_and_the_spread_that_they_are_said_to_have(distribution: dict[str, Any]) -> None:
    times = StepTimes.of([{"mean": 3.0, **distribution}], seed=11)

    drawn = [times.draw(0, number) for number in range(40_000)]

    spread = StepTime(3.0, **distribution).spread
    assert spread is not None
    assert times.mean(0) == 3.0
    assert statistics.fmean(drawn) == pytest.approx(3.0, rel=0.03)
    assert statistics.pstdev(drawn) / 3.0 == pytest.approx(spread, rel=0.08)


def test_neighbouring_draws_workers_and_seeds_have_nothing_to_do_with_each_other() -> None:
    def draws(seed: int, worker: int, first: int = 0) -> list[float]:
        times = StepTimes.of({"mean": 1.0, "spread": 0.5, "distribution": "uniform"}, workers=2, seed=seed)
        return [times.draw(worker, number) for number in range(first, first + 5000)]

    own = draws(0, 0)
    for other in (draws(0, 0, first=1), draws(0, 1), draws(1, 0)):
        assert abs(statistics.correlation(own, other)) < 0.05


def test_more_workers_than_were_given_are_each_of_them_in_turn() -> None:
    times = StepTimes.of([1, 2, 4], workers=11, seed=3)

    means = [times.mean(worker) for worker in range(11)]

    assert means[:9] == [1, 2, 4] * 3
    assert len({*means[9:]}) == 2
    assert {*means[9:]} < {1, 2, 4}
    assert means == [StepTimes.of([1, 2, 4], workers=11, seed=3).mean(worker) for worker in range(11)]
    assert len({StepTimes.of([1, 2, 4], workers=1, seed=seed).mean(0) for seed in range(20)}) == 3


def test_the_number_of_workers_that_is_given_leaves_them_in_their_order() -> None:
    times = StepTimes.of([4, 1, 2], workers=3)

    assert [times.mean(worker) for worker in range(3)] == [4, 1, 2]


def test_the_steps_of_a_recorded_run_are_drawn_from_its_own_ranks(tmp_path: Path) -> None:
    folder = record(tmp_path, [[1.0, 3.0], [10.0]])

    times = StepTimes.of(folder)
    more = StepTimes.of(str(folder / RECORD_NAME), workers=4)

    assert [times.mean(0), times.mean(1), more.workers] == [2.0, 10.0, 4]
    assert {times.draw(0, number) for number in range(50)} == {1.0, 3.0}
    assert {more.draw(3, number) for number in range(50)} == {10.0}


def test_a_run_without_steps_of_its_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="does not exist"):
        StepTimes.of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no steps of rank 1; take one of more batches"):
        StepTimes.of(record(tmp_path, [[1.0], []]))
    RunRecord("DDPStrategy", 2, 1, True, "now").write(tmp_path / RECORD_NAME)
    with pytest.raises(ValueError, match="has no steps of its ranks"):
        StepTimes.of(tmp_path)


@pytest.mark.parametrize(
    ("spec", "workers", "message"),
    [
        ([], None, "step_seconds is empty. Give the seconds of each worker's steps"),
        (1.0, None, "describes one worker. Say how many with workers=N"),
        ([1.0], 0, "workers must be an int of at least 1, not 0"),
        ([1.0], True, "workers must be an int of at least 1, not True"),
        ([-1.0], None, "A step takes a number of seconds of at least 0, not -1.0"),
        ([float("nan")], None, "not nan"),
        ([True], None, "not True"),
        (["fast"], None, "not 'fast'"),
        ([[]], None, "list of step seconds is empty"),
        ([[1.0, -1.0]], None, "not -1.0"),
        ([{"mean": 1, "sigma": 2}], None, "has mean, spread and distribution; .*sigma"),
        ([{"spread": 0.1}], None, "has mean, spread and distribution"),
        ([{"mean": 1, "distribution": "gamma"}], None, "is one of 'constant', 'normal'.* not 'gamma'"),
        ([{"mean": 1, "distribution": "normal"}], None, "A normal step time needs a spread"),
        ([{"mean": 1, "spread": 0.1}], None, "The spread of a constant step time"),
        ([{"mean": 1, "spread": 0.5, "distribution": "normal"}], None, "is 0 to 0.333, not 0.5. Take .*lognormal"),
    ],
    ids=str,
)
def test_a_description_without_a_meaning_is_refused(spec: Any, workers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepTimes.of(spec, workers)


def test_a_seed_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seed must be an int, not 0\.5"):
        StepTimes.of([1.0], seed=0.5)  # type: ignore[arg-type]
