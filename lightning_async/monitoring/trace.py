"""A run's timeline as a Chrome trace (JSON), for ui.perfetto.dev or chrome://tracing.

Each rank is a process with two tracks: its training loop, and what the barrier at the holder does with its gradients.
Its counter shows the staleness of each of its updates. The holder is a process too, with a track for its updates; an
arrow leads there from each push. Pure but for the file.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_async.monitoring.spans import AppliedUpdate, Recording, UpdateRecorder

__all__ = ["write_trace"]

_LOOP, _BARRIER = 0, 1

# For each rank and version read the updates of its pushes, each with the number of its arrow.
_Answers = Mapping[tuple[int, int], deque[tuple[int, AppliedUpdate]]]


def write_trace(
    path: Path,
    ranks: Sequence[Recording | None],
    updates: UpdateRecorder,
    configuration: Mapping[str, Any],
    ended_by: str | None = None,
) -> None:
    """Writes the timeline, beginning at 0; a reader sees the old file or the new one.

    Args:
        path: the file; its folder is made.
        ranks: what each rank did; None where that is not known.
        updates: what rank 0 noted of the updates.
        configuration: of the run; kept in the trace's metadata.
        ended_by: what has ended the run early; kept in the metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    applied = list(updates.updates())
    begin_ns = min(
        (
            *(min(each.starts_ns) + each.offset_ns for each in ranks if each),
            *(update.start_ns - update.parked_ns for update in applied),
        ),
        default=0,
    )
    about: dict[str, Any] = {"configuration": dict(configuration), **_limits(ranks, begin_ns)}
    if ended_by is not None:
        about["ended_by"] = ended_by
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms",\n"otherData": ')
        json.dump(about, file)
        file.write(',\n"traceEvents": [\n')
        encode = json.JSONEncoder(separators=(",", ":")).encode
        for number, event in enumerate(_events(ranks, applied, begin_ns)):
            file.write(",\n" if number else "")
            file.write(encode(event))
        file.write("\n]}\n")
    os.replace(partial, path)


def _limits(ranks: Sequence[Recording | None], begin_ns: int) -> dict[str, Any]:
    cut = {
        f"rank {rank}": f"complete until {(recording.full_at_ns + recording.offset_ns - begin_ns) / 1e9:.3f} s; "
        f"{recording.left_out} later spans are left out (limit: {recording.limit})"
        for rank, recording in enumerate(ranks)
        if recording is not None and recording.full_at_ns is not None
    }
    unknown = {f"rank {rank}": "its spans did not reach rank 0" for rank, each in enumerate(ranks) if each is None}
    return {"truncated": cut | unknown} if cut | unknown else {}


def _events(
    ranks: Sequence[Recording | None], updates: Sequence[AppliedUpdate], begin_ns: int
) -> Iterator[dict[str, Any]]:
    answers: defaultdict[tuple[int, int], deque[tuple[int, AppliedUpdate]]] = defaultdict(deque)
    for number, update in enumerate(updates):
        answers[update.worker, update.version_read].append((number, update))
    holder = len(ranks)
    yield from _names(holder, "holder", -1, {_LOOP: "updates"})
    arrows: set[int] = set()
    for rank, recording in enumerate(ranks):
        yield from _names(rank, f"rank {rank}", rank, {_LOOP: "training loop", _BARRIER: "barrier"})
        if recording is not None:
            yield from _of_the_loop(rank, recording, answers, arrows, begin_ns)
        own = [update for update in updates if update.worker == rank]
        yield from _of_the_barrier(rank, own, begin_ns)
    for number, update in enumerate(updates):
        yield from _of_the_holder(holder, number if number in arrows else None, update, begin_ns)


def _names(pid: int, process: str, place: int, tracks: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": place}}
    for track, name in tracks.items():
        yield {"ph": "M", "pid": pid, "tid": track, "name": "thread_name", "args": {"name": name}}


def _of_the_loop(
    rank: int, recording: Recording, answers: _Answers, arrows: set[int], begin_ns: int
) -> Iterator[dict[str, Any]]:
    for span in recording.spans():
        arguments: dict[str, Any] = {}
        if span.batch is not None:
            arguments["batch"] = span.batch
        if span.version is not None:
            arguments["version"] = span.version
        arrow = None
        answer = answers.get((rank, span.version or 0)) if span.name == "push" else None
        if answer:
            number, update = answer.popleft()
            arguments |= {"staleness": update.staleness, "applied": update.applied}
            # Clocks of two hosts may differ by more than a push takes; an arrow must not lead back in time.
            arrow = number if update.start_ns >= span.start_ns else None
        slice_ = _slice(rank, _LOOP, span.name, span.start_ns, span.stop_ns, begin_ns, arguments)
        yield slice_
        if arrow is not None:
            arrows.add(arrow)
            yield _arrow("s", arrow, slice_)


def _of_the_barrier(rank: int, updates: Sequence[AppliedUpdate], begin_ns: int) -> Iterator[dict[str, Any]]:
    parked = [update for update in updates if update.parked_ns]
    for update in sorted(parked, key=lambda update: update.start_ns - update.parked_ns):
        arguments = {"version": update.version_read, "staleness": update.staleness}
        began_ns = update.start_ns - update.parked_ns
        yield _slice(rank, _BARRIER, "parked", began_ns, update.start_ns, begin_ns, arguments)
    for update in updates:
        if update.applied:
            when = (update.stop_ns - begin_ns) / 1000
            yield {"ph": "C", "pid": rank, "name": "staleness", "ts": when, "args": {"updates": update.staleness}}


def _of_the_holder(pid: int, arrow: int | None, update: AppliedUpdate, begin_ns: int) -> Iterator[dict[str, Any]]:
    arguments = {
        "rank": update.worker,
        "version read": update.version_read,
        "version": update.version,
        "staleness": update.staleness,
        "parked ms": update.parked_ns / 1e6,
    }
    became = "update" if update.applied else "rejected" if update.rejected else "dropped"
    name = f"{became} rank {update.worker}"
    slice_ = _slice(pid, _LOOP, name, update.start_ns, update.stop_ns, begin_ns, arguments)
    yield slice_
    if arrow is not None:
        yield _arrow("f", arrow, slice_)


def _slice(
    pid: int, tid: int, name: str, start_ns: int, stop_ns: int, begin_ns: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    when, duration = (start_ns - begin_ns) / 1000, (stop_ns - start_ns) / 1000
    event = {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": when, "dur": duration}
    return {**event, "args": arguments} if arguments else event


def _arrow(phase: str, number: int, slice_: Mapping[str, Any]) -> dict[str, Any]:
    """One end of a flow, bound to the slice that encloses it: the one that begins at the same time on its track."""
    event = {"ph": phase, "id": number, "name": "push to update", "cat": "push"}
    event |= {name: slice_[name] for name in ("pid", "tid", "ts")}
    return event if phase == "s" else {**event, "bp": "e"}
