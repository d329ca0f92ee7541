"""A run's record keeps what the report needs, within bounds, and refuses other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_async.holder.types import Push, Update
from lightning_async.monitoring.record import RECORD_NAME, Point, RecordError, RunRecord, Series
from lightning_async.monitoring.stats import RunStats


def record() -> RunRecord:
    stats = RunStats(workers=2)
    for worker, staleness in [(0, 0), (1, 12), (1, 3), (0, 1)]:
        push = Push(worker, 0, version_read=0, gradients=[], groups=[], waited_s=0.0)
        stats.record(Update(push, version=1, staleness=staleness, applied=True, parked_s=0.0))
    series = Series()
    series.add(Point(1.0, 1.5, 4, 16, 0.25))
    configuration = {"ranks": 2, "max_staleness": None, "on_stale": "wait", "batches": "shared"}
    return RunRecord.of(configuration, stats, series, finished=True, written_at="2026-01-01T00:00:00+00:00")


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = record()
    written.write(tmp_path / "run" / RECORD_NAME)

    assert RunRecord.read(tmp_path / "run") == written
    assert RunRecord.read(tmp_path / "run" / RECORD_NAME).stats["staleness_by_rank"] == {
        0: {0: 1, 1: 1},
        1: {12: 1, 3: 1},
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RECORD_NAME]


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
        (json.dumps({"format": "lightning_async run", "format_version": 99}), "format version 99"),
        (json.dumps({"format": "lightning_async run", "format_version": 1}), "is damaged"),
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
        {"configuration": {}},
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
