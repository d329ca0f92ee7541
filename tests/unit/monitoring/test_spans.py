"""Spans nest, are bounded, and make a trace that viewers take."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.holder.types import Push, Update
from lightning_async.monitoring.spans import Recording, SpanRecorder, UpdateRecorder
from lightning_async.monitoring.trace import write_trace
from tests.trace_rules import check_trace, slices


def spans(recorder: SpanRecorder) -> list[tuple[str, int, int]]:
    offset = recorder.recording.offset_ns
    return [(span.name, span.start_ns - offset, span.stop_ns - offset) for span in recorder.recording.spans()]


def recorder_of(limit: int = 100) -> SpanRecorder:
    return SpanRecorder(limit, version=lambda: 0)


def test_a_step_is_computing_until_its_push() -> None:
    recorder = recorder_of(100)
    recorder.begin_batch(10, batch=0)
    recorder.add("push", 50, 55)
    recorder.add("wait", 55, 70)
    recorder.add("pull", 70, 72)
    recorder.end_batch(80)
    recorder.add("draw", 81, 84)
    recorder.begin_batch(90, batch=0)

    assert spans(recorder) == [
        ("compute", 10, 50),
        ("push", 50, 55),
        ("wait", 55, 70),
        ("pull", 70, 72),
        ("data", 80, 90),
        ("draw", 81, 84),
    ]


def test_a_second_optimizer_computes_from_the_first_ones_parameters_on() -> None:
    recorder = recorder_of(100)
    recorder.begin_batch(0, batch=0)
    for start in (10, 30):
        recorder.add("push", start, start + 1)
        recorder.add("pull", start + 1, start + 2)
    recorder.end_batch(40)

    assert [span for span in spans(recorder) if span[0] == "compute"] == [("compute", 0, 10), ("compute", 12, 30)]


def test_a_batch_without_a_push_has_computed_too() -> None:
    recorder = recorder_of(100)
    recorder.begin_batch(0, batch=0)
    recorder.end_batch(10)
    recorder.interrupt(15)
    recorder.interrupt(99)

    assert spans(recorder) == [("compute", 0, 10), ("sync", 10, 15)]


def test_a_recording_is_bounded_and_travels() -> None:
    recorder = recorder_of(3)
    for start in range(10):
        recorder.add("wait", start, start + 1)

    recording: Recording = pickle.loads(pickle.dumps(recorder.recording))

    assert len(recording) == 3
    assert (recording.left_out, recording.full_at_ns) == (7, 3)
    assert [span.name for span in recording.spans()] == ["wait"] * 3


def test_spans_know_their_batch_and_the_version_that_was_computed_with() -> None:
    versions = iter([4, 9])
    recorder = SpanRecorder(limit=100, version=lambda: next(versions))
    recorder.begin_batch(0, batch=17)
    for name, start in (("push", 10), ("wait", 20), ("pull", 30)):
        recorder.add(name, start, start + 5)

    assert [(span.name, span.batch, span.version) for span in recorder.recording.spans()] == [
        ("compute", 17, 4),
        ("push", 17, 4),
        ("wait", None, None),
        ("pull", None, 9),
    ]


def test_a_checkpoint_in_the_middle_of_a_batch_ends_no_computation() -> None:
    recorder = recorder_of()
    recorder.begin_batch(0, batch=0)
    recorder.add("checkpoint", 3, 6)
    recorder.add("push", 10, 12)

    assert spans(recorder) == [("compute", 0, 10), ("checkpoint", 3, 6), ("push", 10, 12)]


def trace(
    path: Path, recordings: list[Recording | None], updates: UpdateRecorder, ended_by: str | None = None
) -> dict[str, Any]:
    write_trace(path, recordings, updates, {"ranks": len(recordings)}, ended_by)
    return dict(json.loads(path.read_text()))


def update(
    worker: int,
    read: int,
    version: int,
    at_ns: int,
    took_ns: int = 10,
    applied: bool = True,
    parked_s: float = 0.0,
) -> Update:
    push = Push(worker, 0, version_read=read, gradients=(), groups=())
    return Update(push, version, version - read - applied, applied, parked_s, at_ns, took_ns)


def recording(offset_ns: int = 0, limit: int = 100) -> Recording:
    return Recording(offset_ns, limit)


def recorder_of_updates(workers: int, *noted: Update, limit: int = 100) -> UpdateRecorder:
    updates = UpdateRecorder(workers, limit)
    # By the same clock as the recordings of these tests.
    updates._offset_ns = 0
    for each in noted:
        updates.add(each)
    return updates


def test_hosts_whose_clocks_started_at_other_times_are_aligned(tmp_path: Path) -> None:
    first, second = recording(offset_ns=1_000_000), recording(offset_ns=5_000_000)
    first.add("compute", 7_000_000, 9_000_000)
    second.add("compute", 3_500_000, 4_000_000)

    events = trace(tmp_path / "run.json", [first, second], UpdateRecorder(2, limit=9))["traceEvents"]

    timed = [(event["pid"], event["ts"], event["dur"]) for event in slices(events)]
    assert timed == [(0, 0.0, 2000.0), (1, 500.0, 500.0)]


def test_a_trace_says_where_it_was_cut_and_shows_each_updates_staleness(tmp_path: Path) -> None:
    cut = recording(limit=1)
    cut.add("compute", 1_000_000_000, 2_000_000_000)
    cut.add("wait", 3_000_000_000, 4_000_000_000)
    noted = [update(0, 0, version, 10**9 * version, parked_s=0.001 * version) for version in (3, 5, 7)]
    dropped = update(1, 0, 9, 9 * 10**9, applied=False)

    whole = trace(tmp_path / "deep" / "run.json", [cut, recording()], recorder_of_updates(2, *noted, dropped, limit=2))

    (cut_at,) = whole["otherData"]["truncated"].values()
    assert cut_at == "complete until 2.000 s; 1 later spans are left out (limit: 1)"
    assert whole["otherData"]["configuration"] == {"ranks": 2}
    counters = [event["args"]["updates"] for event in whole["traceEvents"] if event["ph"] == "C"]
    assert counters == [2, 4]
    assert [event["dur"] for event in slices(whole["traceEvents"], "parked")] == [3000.0, 5000.0]
    names = [event["name"] for event in slices(whole["traceEvents"]) if event["pid"] == 2]
    assert names == ["update rank 0", "update rank 0", "dropped rank 1"]


def test_a_push_tells_what_became_of_it_and_an_arrow_leads_to_its_update(tmp_path: Path) -> None:
    rank = recording()
    rank.add("push", 5_000, 6_000, batch=3, version=7)
    rank.add("push", 25_000, 26_000, batch=4, version=9)

    noted = recorder_of_updates(1, update(0, 7, 9, at_ns=8_000), update(0, 9, 10, at_ns=30_000))
    events = trace(tmp_path / "run.json", [rank], noted)["traceEvents"]

    check_trace(events)
    assert [event["args"] for event in slices(events, "push")] == [
        {"batch": 3, "version": 7, "staleness": 1, "applied": True},
        {"batch": 4, "version": 9, "staleness": 0, "applied": True},
    ]
    assert [(event["ts"], event["id"]) for event in events if event["ph"] == "s"] == [(0.0, 0), (20.0, 1)]
    assert [(event["pid"], event["id"]) for event in events if event["ph"] == "f"] == [(1, 0), (1, 1)]
    assert [event["args"]["version"] for event in slices(events, "update rank 0")] == [9, 10]


def test_no_arrow_leads_back_in_time(tmp_path: Path) -> None:
    """The clock of the rank's host is ahead of the holder's."""
    rank = recording()
    rank.add("push", 50_000, 60_000, batch=0, version=0)

    events = trace(tmp_path / "run.json", [rank], recorder_of_updates(1, update(0, 0, 1, at_ns=8_000)))["traceEvents"]

    check_trace(events)
    assert [event for event in events if event["ph"] in "sf"] == []


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 90), st.integers(0, 90), st.booleans(), st.booleans()), max_size=40
    ),
    limit=st.integers(1, 12),
)
def test_every_trace_keeps_the_rules_of_the_format(
    steps: list[tuple[int, int, int, bool, bool]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recorders = [SpanRecorder(limit, version=lambda: version) for _ in range(3)]
    for recorder in recorders:
        recorder.recording.offset_ns = 0
    updates = recorder_of_updates(3, limit=limit)
    version, now, us = 0, 0, 1_000
    for batch, (rank, computing, travelling, applied, meets) in enumerate(steps):
        recorder, read = recorders[rank], version
        recorder.begin_batch(now, batch)
        now += (100 + computing) * us
        started, now = now, now + (100 + travelling) * us
        recorder.add("push", started, now)
        version += applied
        done, parked_s = now + 40 * us, 1e-6 * travelling
        updates.add(update(rank, read, version, done, took_ns=30 * us, applied=applied, parked_s=parked_s))
        recorder.add("wait", now, now + 50 * us)
        recorder.add("pull", now + 50 * us, now + 60 * us)
        now += 100 * us
        recorder.end_batch(now)
        recorder.add("draw", now + 1, now + 2)
        if meets:
            recorder.recording.add("checkpoint", now + 3, now + 9)
            recorder.interrupt(now + 10)
            recorder.recording.add("validation", now + 10, now + 20)
        now += 30 * us

    path = tmp_path_factory.mktemp("trace") / "run.json"
    check_trace(trace(path, [recorder.recording for recorder in recorders], updates)["traceEvents"])


def test_a_trace_of_a_run_that_broke_off_says_so_and_has_the_updates_of_all_ranks(tmp_path: Path) -> None:
    own = recording()
    own.add("push", 5_000, 6_000, batch=3, version=0)
    noted = recorder_of_updates(2, update(0, 0, 1, at_ns=6_000), update(1, 0, 2, at_ns=7_000))

    whole = trace(tmp_path / "run.json", [own, None], noted, ended_by="KeyboardInterrupt")

    check_trace(whole["traceEvents"])
    assert whole["otherData"]["ended_by"] == "KeyboardInterrupt"
    assert whole["otherData"]["truncated"] == {"rank 1": "its spans did not reach rank 0"}
    names = [event["name"] for event in slices(whole["traceEvents"])]
    assert names == ["push", "update rank 0", "update rank 1"]


def test_a_trace_of_nothing_is_a_trace(tmp_path: Path) -> None:
    whole = trace(tmp_path / "run.json", [Recording(0, 1)], UpdateRecorder(1, 1))
    assert {event["ph"] for event in whole["traceEvents"]} == {"M"}
