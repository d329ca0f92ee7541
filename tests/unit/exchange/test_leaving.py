"""Whatever moment rank 0 is lost at, a state is left that goes with the snapshot on the disk, and the newest such."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_async.exchange.last_state import LastState, LastStateFile
from lightning_async.exchange.leaving import Leaving
from lightning_async.holder.types import HalfUpdatedError
from tests.unit.exchange.test_last_state import state


class Held:
    """What a holder holds: its version."""

    def __init__(self, folder: Path) -> None:
        self.version = 0
        self.is_half_updated = False
        self.snapshot = folder / "snapshot.ckpt"
        self.leaving = Leaving(self.take)

    def take(self, segment: str) -> LastState:
        if self.is_half_updated:
            raise HalfUpdatedError("an update was broken off")
        return state(self.version, segment)

    def pass_segment(self, segment: str, version: int) -> None:
        """A whole segment, to a version; its snapshot is written meanwhile."""
        self.leaving.begin_segment(self.snapshot, segment)
        self.leaving.expect_snapshot(segment)
        self.leaving.note_saved(segment)
        self.version = version
        self.leaving.end_segment()

    def left(self, segment: str) -> int | None:
        """The version that was left of a segment."""
        found = LastStateFile(self.snapshot).read(segment)
        return None if found is None else found.version


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path)


def test_without_a_segment_nothing_is_left(held: Held) -> None:
    held.leaving.end_segment()
    held.leaving.write()
    held.leaving.release()

    assert not held.snapshot.parent.joinpath("snapshot.last.pt").exists()


def test_until_a_segments_snapshot_is_there_the_end_of_the_one_before_is_kept(held: Held) -> None:
    held.pass_segment("one", 4)
    held.leaving.end_segment()
    held.version = 5
    held.leaving.begin_segment(held.snapshot, "two")
    held.version = 7
    held.leaving.write()
    assert (held.left("one"), held.left("two")) == (4, 7)

    held.leaving.note_saved("one")
    held.leaving.write()
    assert (held.left("one"), held.left("two")) == (4, 7)
    held.leaving.note_saved("two")
    held.leaving.write()
    assert (held.left("one"), held.left("two")) == (None, 7)


def test_between_two_segments_the_end_of_the_first_is_left(held: Held) -> None:
    held.pass_segment("one", 4)
    held.leaving.write()

    assert held.left("one") == 4


def test_half_an_update_is_not_left(held: Held) -> None:
    held.leaving.begin_segment(held.snapshot, "one")
    held.leaving.expect_snapshot("one")
    held.leaving.note_saved("one")
    held.leaving.end_segment()
    held.leaving.begin_segment(held.snapshot, "two")
    held.is_half_updated = True
    with pytest.raises(HalfUpdatedError):
        held.leaving.write()
    assert (held.left("one"), held.left("two")) == (0, None)

    held.leaving.note_saved("two")
    held.leaving.end_segment()
    held.leaving.write()
    assert (held.left("one"), held.left("two")) == (0, None)


EVENTS = ["update", "begin", "end", "take a snapshot", "write it", "fail to write it", "tell"]
TOLD_LATE = ["begin", "take a snapshot", "update", "end", "write it", "tell"]
NEXT_ONE_FAILS = ["begin", "take a snapshot", "write it", "tell", "update", "end"]


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
@example(TOLD_LATE)
@example([*NEXT_ONE_FAILS, "begin", "take a snapshot", "fail to write it", "update", "end"])
def test_of_the_segment_whose_snapshot_is_on_the_disk_nothing_that_was_applied_is_lost(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
) -> None:
    held = Held(tmp_path_factory.mktemp("run"))
    begun: list[str] = []
    # The version that each segment has come to.
    versions: dict[str, int] = {}
    is_open = False
    being_written = on_disk = untold = ""
    for event in events:
        if event == "update" and is_open:
            held.version += 1
            versions[begun[-1]] = held.version
        elif event == "take a snapshot" and is_open and not being_written:
            # The main thread tells of the one before first.
            if untold:
                held.leaving.note_saved(untold)
            held.leaving.expect_snapshot(begun[-1])
            being_written, untold = begun[-1], ""
        elif event == "write it" and being_written:
            on_disk = untold = being_written
            being_written = ""
        elif event == "fail to write it":
            being_written = ""
        elif event == "tell" and untold:
            held.leaving.note_saved(untold)
            untold = ""
        elif event == "end" and is_open:
            held.leaving.end_segment()
            is_open = False
        elif event == "begin" and not is_open:
            begun.append(f"{len(begun)}")
            versions[begun[-1]] = held.version
            held.leaving.begin_segment(held.snapshot, begun[-1])
            is_open = True
    held.leaving.write()

    if on_disk:
        assert held.left(on_disk) == versions[on_disk]
    held.leaving.release()
