"""A measurement is read as it was written, and those that are there are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record
from lightning_async.monitoring import RecordError

RESULTS = sorted(record.RESULTS.glob("*.json"))


def test_a_measurement_comes_back_with_the_machine_and_the_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")

    record.save("scaling", {"ranks": [1, 2]}, [{"speed_up": 1.5}])

    found = record.load("scaling")
    assert found is not None
    assert (found["arguments"], found["found"]) == ({"ranks": [1, 2]}, [{"speed_up": 1.5}])
    assert found["machine"].keys() == {"cores", "processor", "python", "torch", "lightning"}
    assert len(found["date"]) == len("2026-01-01")
    assert capsys.readouterr().out == "written to results/scaling.json\n"
    assert record.load("memory") is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_measurements_in_the_repository_are_read(path: Path) -> None:
    found = record.load(path.stem)

    assert found is not None
    assert found.keys() == {"date", "machine", "arguments", "found"}
    assert found["found"]


def test_a_measurement_in_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    (tmp_path / "scaling.json").write_text(json.dumps({"format": "lightning_async measurement", "format_version": 9}))

    with pytest.raises(RecordError, match=r"format version 9; this lightning_async reads 1\. Run the benchmark anew"):
        record.load("scaling")
