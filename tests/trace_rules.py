"""The rules of the Chrome trace event format that a viewer such as Perfetto relies on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["check_trace", "slices", "tracks"]

Event = Mapping[str, Any]

# What each phase must have, besides the phase itself.
_NEEDED = {
    "M": {"pid", "name", "args"},
    "X": {"pid", "tid", "name", "ts", "dur"},
    "C": {"pid", "name", "ts", "args"},
    "s": {"pid", "tid", "name", "cat", "id", "ts"},
    "f": {"pid", "tid", "name", "cat", "id", "ts", "bp"},
}


def slices(events: Iterable[Event], name: str | None = None) -> list[Event]:
    """The complete events, or those of one name."""
    return [event for event in events if event["ph"] == "X" and name in (None, event["name"])]


def tracks(events: Iterable[Event]) -> dict[tuple[int, int], list[Event]]:
    """What lies on each track, in the file's order."""
    found: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        if "tid" in event and event["ph"] != "M":
            found[event["pid"], event["tid"]].append(event)
    return dict(found)


def check_trace(events: list[Event]) -> None:
    """Checks that a viewer shows what is meant.

    Each event has what its phase needs. On a track time goes on, and slices nest or follow one another. Each flow has a
    number of its own, one start and one end, which is not earlier, and both lie in a slice that encloses them.

    Raises:
        AssertionError: if a rule is broken.
    """
    for event in events:
        assert _NEEDED[event["ph"]] <= event.keys(), event
    for on_track in tracks(events).values():
        times = [event["ts"] for event in on_track]
        assert times == sorted(times)
        _check_nesting(slices(on_track))
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(starts) == sum(event["ph"] == "s" for event in events)
    assert len(ends) == sum(event["ph"] == "f" for event in events)
    assert starts.keys() == ends.keys()
    by_track = {track: slices(on_track) for track, on_track in tracks(events).items()}
    edges = {track: {event["ts"] for event in on_track} for track, on_track in by_track.items()}
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"]
        assert end["bp"] == "e"
        for step in (start, end):
            assert step["ts"] in edges[step["pid"], step["tid"]], f"{step} lies in no slice that begins there"


def _check_nesting(found: list[Event]) -> None:
    enclosing: list[Event] = []
    for event in found:
        assert event["dur"] >= 0, event
        while enclosing and _stop(enclosing[-1]) <= event["ts"] + 1e-3:
            enclosing.pop()
        if enclosing:
            assert _stop(event) <= _stop(enclosing[-1]) + 1e-3, f"{event} reaches out of {enclosing[-1]}"
        enclosing.append(event)


def _stop(event: Event) -> float:
    return float(event["ts"] + event["dur"])
