"""A run's timeline as a Chrome trace (JSON), for ui.perfetto.dev or chrome://tracing.

Each rank is a process with two tracks: its training loop, and what the barrier at the holder does with its gradients.
Its counter shows the staleness of each of its updates. Pure but for the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_async.monitoring.spans import Recording, StalenessRecorder

__all__ = ["write_trace"]

_LOOP, _BARRIER = 0, 1


def write_trace(
    path: Path, ranks: Sequence[Recording], updates: StalenessRecorder, configuration: Mapping[str, Any]
) -> None:
    """Writes the timeline of all ranks, beginning at 0, event by event.

    Args:
        path: the file; its folder is made.
        ranks: what each rank did.
        updates: what rank 0 noted of the updates.
        configuration: of the run; kept in the trace's metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [*ranks, *updates.parked]
    begin_ns = min((start for part in parts for _, start, _ in part.spans()), default=0)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms",\n"otherData": ')
        json.dump({"configuration": dict(configuration), **_limits(ranks, begin_ns)}, file)
        file.write(',\n"traceEvents": [\n')
        for number, event in enumerate(_events(ranks, updates, begin_ns)):
            file.write(",\n" if number else "")
            json.dump(event, file, separators=(",", ":"))
        file.write("\n]}\n")


def _limits(ranks: Sequence[Recording], begin_ns: int) -> dict[str, Any]:
    cut = {
        f"rank {rank}": f"complete until {(recording.full_at_ns + recording.offset_ns - begin_ns) / 1e9:.3f} s; "
        f"{recording.left_out} later spans are left out (limit: {recording.limit})"
        for rank, recording in enumerate(ranks)
        if recording.full_at_ns is not None
    }
    return {"truncated": cut} if cut else {}


def _events(ranks: Sequence[Recording], updates: StalenessRecorder, begin_ns: int) -> Iterator[dict[str, Any]]:
    for rank, recording in enumerate(ranks):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
        for track, name in ((_LOOP, "training loop"), (_BARRIER, "barrier")):
            yield {"ph": "M", "pid": rank, "tid": track, "name": "thread_name", "args": {"name": name}}
        yield from _spans(rank, _LOOP, recording, begin_ns)
        yield from _spans(rank, _BARRIER, updates.parked[rank], begin_ns)
        for time_ns, staleness in zip(updates.times_ns[rank], updates.staleness[rank], strict=True):
            when = (time_ns - begin_ns) / 1000
            yield {"ph": "C", "pid": rank, "name": "staleness", "ts": when, "args": {"updates": staleness}}


def _spans(rank: int, track: int, recording: Recording, begin_ns: int) -> Iterator[dict[str, Any]]:
    for name, start, stop in recording.spans():
        yield {
            "ph": "X",
            "pid": rank,
            "tid": track,
            "name": name,
            "ts": (start - begin_ns) / 1000,
            "dur": (stop - start) / 1000,
        }
