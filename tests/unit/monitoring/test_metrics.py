"""The loggers get a row for each stretch that is long enough, and at the end the whole run's numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.holder.types import Push, Update
from lightning_async.monitoring import stats as stats_module
from lightning_async.monitoring.metrics import MetricsLogger, is_worth_a_row
from lightning_async.monitoring.stats import RunStats


class Writer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.configured: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.staleness: list[dict[int, int]] = []
        self.summaries: list[tuple[dict[str, float], dict[str, float], int]] = []

    def configure(self, configuration: dict[str, Any]) -> None:
        self.configured.append(configuration)

    def log(self, metrics: dict[str, float], staleness: Counter[int], step: int) -> None:
        self.logged.append((step, metrics))
        self.staleness.append(dict(staleness))

    def summarize(self, summary: dict[str, float], metrics: dict[str, float], step: int) -> None:
        self.summaries.append((summary, metrics, step))


class Run:
    """A run by a clock that the test sets, with a logger that is asked for rows every ``every`` steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int = 1, workers: int = 2, writers: int = 1) -> None:
        self.now, self.version = 100.0, 0
        monkeypatch.setattr(stats_module.time, "perf_counter", lambda: self.now)
        self.stats = RunStats(workers)
        self.writers = [Writer() for _ in range(writers)]
        self.metrics = MetricsLogger(self.stats, self.writers, every)
        self.metrics.begin(-1)
        self.stats.start_segment()

    @property
    def rows(self) -> list[dict[str, float]]:
        return [row for _, row in self.writers[0].logged]

    def update(self, worker: int, staleness: int, waited_s: float = 0.0, applied: bool = True) -> None:
        self.version += applied
        push = Push(worker, 0, version_read=0, gradients=(), groups=(), samples=8, waited_s=waited_s)
        update = Update(push, self.version, staleness, applied, parked_s=0.0, at_ns=round(self.now * 1e9))
        self.stats.record(update)

    def validate(self, seconds: float) -> None:
        self.stats.end_segment()
        self.now += seconds
        self.stats.start_segment()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


def test_each_row_covers_what_has_happened_since_the_last(run: Run) -> None:
    for staleness in [0] * 19 + [10]:
        run.update(0, staleness, waited_s=0.05)
    run.now += 2.0
    run.metrics.log(version=20, step=10, epoch=0)

    run.update(1, 4, waited_s=0.4)
    run.update(0, 2, waited_s=0.2)
    run.update(0, 5, applied=False)
    run.now += 1.0
    run.metrics.log(version=22, step=11, epoch=1)

    first, second = run.rows
    assert [step for step, _ in run.writers[0].logged] == [10, 11]
    assert first == {
        "epoch": 0,
        "async/version": 20.0,
        "async/staleness_mean": 0.5,
        "async/staleness_p95": 0.0,
        "async/staleness_max": 10.0,
        "async/updates_per_second": pytest.approx(10.0),
        "async/wait_fraction": pytest.approx(1.0 / (2.0 * 2)),
        "async/ranks": 2.0,
        "async/dropped": 0.0,
        "async/rejected": 0.0,
        "async/refused": 0.0,
        "async/share_rank_0": 1.0,
        "async/share_rank_1": 0.0,
        "async/updates_per_second_rank_0": pytest.approx(10.0),
        "async/updates_per_second_rank_1": 0.0,
    }
    assert second["epoch"] == 1
    assert second["async/staleness_mean"] == 3.0
    assert second["async/staleness_max"] == 4.0
    assert second["async/staleness_p95"] == 4.0
    assert second["async/updates_per_second"] == pytest.approx(2.0)
    assert second["async/wait_fraction"] == pytest.approx(0.6 / 2)
    assert second["async/dropped"] == 1.0
    assert second["async/share_rank_0"] == second["async/share_rank_1"] == 0.5
    assert second["async/updates_per_second_rank_1"] == pytest.approx(1.0)
    assert run.writers[0].staleness == [{0: 19, 10: 1}, {4: 1, 2: 1}]


def test_nothing_is_logged_where_nothing_has_happened(run: Run) -> None:
    run.metrics.log(version=0, step=0, epoch=0)
    run.metrics.finish(version=0, step=0, epoch=0)

    assert (run.rows, run.writers[0].summaries) == ([], [])


def test_validation_is_in_no_rate(run: Run) -> None:
    run.validate(100.0)
    run.update(0, 0)
    run.now += 0.5
    run.metrics.log(version=1, step=1, epoch=0)
    run.metrics.log(version=1, step=2, epoch=0)

    assert [step for step, _ in run.writers[0].logged] == [1]
    assert run.rows[0]["async/updates_per_second"] == pytest.approx(2.0)


@given(every=st.integers(0, 200), steps=st.integers(0, 400))
def test_a_row_covers_half_of_log_every_n_steps_at_least(every: int, steps: int) -> None:
    assert is_worth_a_row(steps, every) == (steps >= every / 2)


@given(stops=st.lists(st.integers(1, 60), min_size=1, max_size=30), every=st.integers(1, 50))
def test_no_row_is_of_a_short_window_and_none_is_missing(stops: list[int], every: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        run = Run(patch, every, workers=1)
        step = -1
        # Rows are asked for at each multiple of `every`, and at each stop.
        for steps in stops:
            for step in range(step + 1, step + 1 + steps):  # noqa: B020  # it goes on from where it was
                run.update(0, staleness=step % 5)
                run.now += 0.1
                if (step + 1) % every == 0:
                    run.metrics.log(run.version, step, epoch=0)
            run.metrics.log(run.version, step, epoch=0)
            run.validate(7.0)
        run.metrics.finish(run.version, step, epoch=0)

    covered = [row["async/updates_per_second"] for row in run.rows]
    assert covered == pytest.approx([10.0] * len(covered))
    assert run.rows[-1]["async/version"] == run.version == sum(stops)
    # Every update is in one histogram, and a row whose window is too short is the run's only one.
    counts = [sum(staleness.values()) for staleness in run.writers[0].staleness]
    assert sum(counts) == sum(stops)
    assert all(2 * count >= every for count in counts[:-1])
    (summary,) = run.writers[0].summaries
    assert summary[0]["updates"] == summary[1]["async/version"] == sum(stops)


def test_what_is_too_short_for_a_row_at_the_end_belongs_to_the_row_before(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, every=10)
    for step in range(12):
        run.update(worker=step % 2, staleness=3 if step < 10 else 0)
        run.now += 1.0 if step < 10 else 0.01
        if step == 9:
            run.metrics.log(run.version, step, epoch=0)
    run.metrics.finish(run.version, step=11, epoch=1)

    (_, last) = run.rows
    assert last["async/version"] == 12
    assert last["async/staleness_mean"] == 2.5
    assert last["async/updates_per_second"] == pytest.approx(12 / 10.02)
    assert run.writers[0].staleness == [{3: 10}, {0: 2}]


def test_a_run_shorter_than_a_window_has_one_row_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, every=50)
    for _ in range(3):
        run.update(0, 1)
        run.now += 1.0
        run.metrics.log(run.version, step=run.version - 1, epoch=0)
    assert run.rows == []

    run.metrics.finish(run.version, step=2, epoch=0)
    run.metrics.finish(run.version, step=2, epoch=0)

    assert [row["async/updates_per_second"] for row in run.rows] == pytest.approx([1.0])
    assert len(run.writers[0].summaries) == 1


def test_the_summary_has_each_metric_over_the_whole_run(run: Run) -> None:
    for staleness in (8, 0, 1):
        run.update(worker=0 if staleness else 1, staleness=staleness, waited_s=0.5)
        run.now += 1.0
        run.metrics.log(run.version, step=run.version, epoch=0)
    run.metrics.finish(run.version, step=3, epoch=0)

    ((summary, metrics, step),) = run.writers[0].summaries
    assert step == 3
    assert {*metrics, "epoch"} == run.rows[-1].keys()
    assert (metrics["async/staleness_max"], run.rows[-1]["async/staleness_max"]) == (8.0, 1.0)
    assert metrics["async/share_rank_0"] == pytest.approx(2 / 3)
    assert metrics["async/updates_per_second"] == summary["updates_per_second"] == pytest.approx(1.0)
    assert metrics["async/wait_fraction"] == summary["wait_fraction"] == pytest.approx(0.25)


def test_all_loggers_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, workers=1, writers=2)
    run.metrics.configure({"ranks": 1})
    run.update(0, 0)
    run.now += 1.0

    run.metrics.log(version=1, step=1, epoch=0)
    run.metrics.finish(version=1, step=1, epoch=0)

    one, other = run.writers
    assert vars(one) == vars(other)
    assert one.configured == [{"ranks": 1}]
    assert one.logged and one.summaries


def test_the_last_row_has_the_last_version_though_its_rank_had_not_read_it(run: Run) -> None:
    run.update(0, 0)
    run.update(1, 1)

    # Rank 0 logs between the other rank's update and its own next look; no update comes after it.
    run.metrics.log(version=1, step=1, epoch=0)
    run.metrics.log(version=2, step=1, epoch=0)

    assert [row["async/version"] for row in run.rows] == [2.0]
