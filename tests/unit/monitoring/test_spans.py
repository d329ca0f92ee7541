"""Spans nest, are bounded, and make a trace that viewers take."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

from lightning_async.monitoring.spans import Recording, SpanRecorder, StalenessRecorder
from lightning_async.monitoring.trace import write_trace


def spans(recorder: SpanRecorder) -> list[tuple[str, int, int]]:
    offset = recorder.recording.offset_ns
    return [(name, start - offset, stop - offset) for name, start, stop in recorder.recording.spans()]


def test_a_step_is_computing_until_its_push() -> None:
    recorder = SpanRecorder(limit=100)
    recorder.begin_batch(10)
    recorder.add("push", 50, 55)
    recorder.add("wait", 55, 70)
    recorder.add("pull", 70, 72)
    recorder.end_batch(80)
    recorder.add("draw", 81, 84)
    recorder.begin_batch(90)

    assert spans(recorder) == [
        ("compute", 10, 50),
        ("push", 50, 55),
        ("wait", 55, 70),
        ("pull", 70, 72),
        ("draw", 81, 84),
        ("data", 80, 90),
    ]


def test_a_second_optimizer_computes_from_the_first_ones_parameters_on() -> None:
    recorder = SpanRecorder(limit=100)
    recorder.begin_batch(0)
    for start in (10, 30):
        recorder.add("push", start, start + 1)
        recorder.add("pull", start + 1, start + 2)
    recorder.end_batch(40)

    assert [span for span in spans(recorder) if span[0] == "compute"] == [("compute", 0, 10), ("compute", 12, 30)]


def test_a_batch_without_a_push_has_computed_too() -> None:
    recorder = SpanRecorder(limit=100)
    recorder.begin_batch(0)
    recorder.end_batch(10)
    recorder.interrupt(15)
    recorder.interrupt(99)

    assert spans(recorder) == [("compute", 0, 10), ("sync", 10, 15)]


def test_a_recording_is_bounded_and_travels() -> None:
    recorder = SpanRecorder(limit=3)
    for start in range(10):
        recorder.add("wait", start, start + 1)

    recording: Recording = pickle.loads(pickle.dumps(recorder.recording))

    assert len(recording) == 3
    assert (recording.left_out, recording.full_at_ns) == (7, 3)
    assert [name for name, _, _ in recording.spans()] == ["wait"] * 3


def trace(path: Path, recordings: list[Recording], updates: StalenessRecorder) -> dict[str, Any]:
    write_trace(path, recordings, updates, {"ranks": len(recordings)})
    return dict(json.loads(path.read_text()))


def test_hosts_whose_clocks_started_at_other_times_are_aligned(tmp_path: Path) -> None:
    first, second = Recording(offset_ns=1_000_000, limit=9), Recording(offset_ns=5_000_000, limit=9)
    first.add("compute", 7_000_000, 9_000_000)
    second.add("compute", 3_500_000, 4_000_000)

    events = trace(tmp_path / "run.json", [first, second], StalenessRecorder(2, limit=9))["traceEvents"]

    timed = [(event["pid"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert timed == [(0, 0.0, 2000.0), (1, 500.0, 500.0)]


def test_a_trace_says_where_it_was_cut_and_shows_each_updates_staleness(tmp_path: Path) -> None:
    recording, updates = Recording(offset_ns=0, limit=1), StalenessRecorder(1, limit=2)
    recording.add("compute", 1_000_000_000, 2_000_000_000)
    recording.add("wait", 3_000_000_000, 4_000_000_000)
    for staleness in (3, 5, 7):
        updates.add(0, staleness, parked_s=0.001 * staleness, applied=True, now_ns=time.monotonic_ns())
    updates.add(0, 9, parked_s=0.0, applied=False, now_ns=time.monotonic_ns())

    whole = trace(tmp_path / "deep" / "run.json", [recording], updates)

    assert whole["otherData"]["truncated"] == {
        "rank 0": "complete until 2.000 s; 1 later spans are left out (limit: 1)"
    }
    assert whole["otherData"]["configuration"] == {"ranks": 1}
    counters = [event["args"]["updates"] for event in whole["traceEvents"] if event["ph"] == "C"]
    assert counters == [3, 5]
    parked = [event["dur"] for event in whole["traceEvents"] if event["name"] == "parked"]
    assert parked == [3000.0, 5000.0]


def test_a_trace_of_nothing_is_a_trace(tmp_path: Path) -> None:
    whole = trace(tmp_path / "run.json", [Recording(0, 1)], StalenessRecorder(1, 1))
    assert {event["ph"] for event in whole["traceEvents"]} == {"M"}
