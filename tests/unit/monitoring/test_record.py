"""A run's record keeps what the report needs, within bounds, and refuses other files."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.holder.types import Push, Update
from lightning_async.monitoring.record import RECORD_NAME, RecordError, RunRecord
from lightning_async.monitoring.series import Evaluation, Evaluations, Point, Series
from lightning_async.monitoring.stats import RunStats


def record() -> RunRecord:
    stats = RunStats(workers=2)
    for worker, staleness in [(0, 0), (1, 12), (1, 3), (0, 1)]:
        push = Push(worker, 0, version_read=0, gradients=[], groups=[], waited_s=0.0)
        stats.record(Update(push, version=1, staleness=staleness, applied=True, parked_s=0.0))
    return RunRecord(
        strategy="AsyncStrategy",
        ranks=2,
        max_epochs=3,
        finished=True,
        written_at="2026-01-01T00:00:00+00:00",
        evaluations=[Evaluation(1.0, 4, 4, 1.0, 1.5, 0.25, {"val/acc": 0.5})],
        configuration={
            "ranks": 2,
            "max_staleness": None,
            "on_stale": "wait",
            "batches": "shared",
            "gradients_per_update": 1,
        },
        stats=stats.as_dict(),
        step_seconds=[stats.step_seconds(0), stats.step_seconds(1)],
        series=[Point(1.0, 1.5, 4, 16, 0.25)],
        about={"module": "Net"},
    )


def record_of_ddp() -> RunRecord:
    return RunRecord("DDPStrategy", 2, None, False, "2026-01-01T00:00:00+00:00", evaluations=record().evaluations)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = record()
    written.write(tmp_path / "run" / RECORD_NAME)

    assert RunRecord.read(tmp_path / "run") == written
    assert RunRecord.read(tmp_path / "run" / RECORD_NAME).stats["staleness_by_rank"] == {
        0: {0: 1, 1: 1},
        1: {12: 1, 3: 1},
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RECORD_NAME]


def test_a_record_of_a_strategy_without_statistics_comes_back_too(tmp_path: Path) -> None:
    record_of_ddp().write(tmp_path / "record.json")

    read = RunRecord.read(tmp_path / "record.json")

    assert read == replace(record_of_ddp(), step_seconds=[], series=[])
    assert read.mean_staleness() is None


def test_a_curve_has_the_evaluations_that_logged_the_metric() -> None:
    late = Evaluation(2.0, 8, 8, 2.0, 3.0, None, {"val/acc": 0.7})
    without = Evaluation(1.5, 6, 6, 1.5, 2.0, None, {"val/loss": 0.1})
    run = replace(record(), evaluations=[*record().evaluations, without, late])

    assert [(point.epoch, value) for point, value in run.curve("val/acc")] == [(1.0, 0.5), (2.0, 0.7)]
    assert (run.last("val/acc"), run.last("val/loss"), run.last("val/f1")) == (0.7, 0.1, None)
    assert run.mean_staleness() == 4.0


def evaluation(batches: int, **changes: Any) -> Evaluation:
    return replace(Evaluation(batches / 10, batches, batches, 1.0 * batches, 2.0 * batches, None, {}), **changes)


@given(count=st.integers(0, 300), half=st.integers(1, 10))
def test_evaluations_are_bounded_and_keep_the_first_and_the_latest(count: int, half: int) -> None:
    evaluations = Evaluations(limit=2 * half)
    for batches in range(1, count + 1):
        evaluations.add(evaluation(batches))
        assert evaluations.kept[0].batches == 1 and evaluations.kept[-1].batches == batches
    kept = [one.batches for one in evaluations.kept]

    assert len(kept) <= 2 * half
    assert count > 2 * half or kept == list(range(1, count + 1))
    distances = {late - early for early, late in itertools.pairwise(kept[:-1])}
    assert len(distances) <= 1 and (count == 0 or len(kept) >= min(count, half))


def test_a_validation_and_the_end_of_an_epoch_without_a_batch_between_are_one_evaluation() -> None:
    evaluations = Evaluations()
    evaluations.add(evaluation(5, train_loss=0.5, metrics={"val/acc": 0.9, "lr": 1.0}))
    evaluations.add(evaluation(5, epoch=1.0, train_loss=None, metrics={"lr": 0.1}))

    (kept,) = evaluations.kept
    assert (kept.epoch, kept.train_loss, kept.metrics) == (1.0, 0.5, {"val/acc": 0.9, "lr": 0.1})


def test_a_long_run_has_no_more_points_than_a_short_one() -> None:
    series = Series(limit=100, every_s=0.1)
    for tick in range(100_000):
        if series.due(tick / 100):
            series.add(Point(tick / 100, tick / 100, tick, 0, None))

    assert 50 <= len(series.points) <= 100
    distances = [late.seconds - early.seconds for early, late in zip(series.points, series.points[1:], strict=False)]
    assert max(distances) <= 2 * min(distances)
    assert series.points[-1].seconds > 950


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "is not JSON"),
        ("[1]", "is not a record of a run"),
        ('{"format": "another"}', "is not a record of a run"),
        ('{"finished": true, "points": [], "strategy": "DDPStrategy"}', "format version 4. Train the run anew"),
        (
            json.dumps({"format": "lightning_async run", "format_version": 1}),
            "format version 1;.*reads 4. Train the run",
        ),
        (json.dumps({"format": "lightning_async run", "format_version": 4}), "is damaged"),
    ],
)
def test_another_file_is_refused_in_one_line(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(content)

    with pytest.raises(RecordError, match=said) as raised:
        RunRecord.read(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"stats": {}},
        {"stats": None},
        {"stats": {**record().stats, "staleness": 3}},
        {"stats": {**record().stats, "updates_by_rank": {0: 4}}},
        {"step_seconds": [[]]},
        {"step_seconds": None},
        {"configuration": {"ranks": 2}},
        {"strategy_of": "a later version"},
        {"evaluations": [{"epoch": 1.0}]},
        {"evaluations": None},
        {"configuration": None},
        {"series": [{"seconds": 1}]},
    ],
)
def test_a_record_with_a_part_missing_is_refused_in_one_line(damage: dict[str, object], tmp_path: Path) -> None:
    record().write(tmp_path / RECORD_NAME)
    whole = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps({**whole, **damage}))

    with pytest.raises(RecordError, match="is damaged") as raised:
        RunRecord.read(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_record_says_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="AsyncMonitor"):
        RunRecord.read(tmp_path)
    record().write(tmp_path / "version_3" / RECORD_NAME)
    with pytest.raises(RecordError, match=r"did you mean .*version_3"):
        RunRecord.read(tmp_path)
