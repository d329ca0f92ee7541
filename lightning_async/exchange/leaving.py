"""What the holder's own process would leave if rank 0 were lost now.

A state goes with the snapshot of the segment of training that it is of; see `last_state.py`. When a segment begins its
snapshot is yet to be written, so the state in which the one before ended is kept until then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lightning_async.exchange.last_state import LastState, LastStateFile
from lightning_async.holder.types import HalfUpdatedError

__all__ = ["Leaving"]

log = logging.getLogger(__name__)


class Leaving:
    """Follows the segments of a run, and leaves what the run can go on from.

    Args:
        take: takes the state of what is held, under the name of a segment.
    """

    def __init__(self, take: Callable[[str], LastState]) -> None:
        self._take = take
        self._file: LastStateFile | None = None
        # The segment that what is held is of, and whether its snapshot is being written, or on the disk.
        self._segment: str | None = None
        self._is_expected = self._is_saved = False
        # In which the last segment ended whose snapshot is on the disk, and one whose snapshot is being written.
        self._ended: LastState | None = None
        self._unsure: LastState | None = None

    def begin_segment(self, snapshot: Path, segment: str) -> None:
        """From here until `end_segment` what is held is of a segment.

        Args:
            snapshot: the file of the run's snapshots.
            segment: its name.
        """
        if self._file is None:
            self._file = LastStateFile(snapshot)
            self._file.claim()
        self._segment, self._is_expected, self._is_saved = segment, False, False

    def expect_snapshot(self, segment: str) -> None:
        """This segment's snapshot is being written; the write before has ended, well only if that was noted."""
        self._is_expected, self._unsure = segment == self._segment, None

    def note_saved(self, segment: str) -> None:
        """A segment's snapshot is on the disk."""
        if segment == self._segment:
            self._is_saved, self._ended, self._unsure = True, None, None
        elif self._unsure is not None and segment == self._unsure.segment:
            self._ended, self._unsure = self._unsure, None

    def end_segment(self) -> None:
        """Something else is about to become of what is held; idempotent."""
        segment, self._segment = self._segment, None
        if segment is None or not (self._is_expected or self._is_saved):
            return
        try:
            ended = self._take(segment)
        except HalfUpdatedError as error:
            # The run has failed.
            log.debug("the end of the segment is not kept: %s", error)
            return
        if self._is_saved:
            self._ended = ended
        else:
            self._unsure = ended

    def write(self) -> None:
        """Rank 0 is lost: leaves what goes with the snapshot on the disk, whichever that is by now.

        Raises:
            HalfUpdatedError: if an update was broken off.
            OSError: if it cannot be written.
        """
        if self._file is None:
            return
        states = [state for state in (self._ended, self._unsure) if state is not None]
        try:
            if self._segment is not None:
                states.append(self._take(self._segment))
        finally:
            if states:
                self._file.write(states)

    def release(self) -> None:
        """The fit has ended with rank 0 in it: nothing is left, and nothing to wait for."""
        if self._file is not None:
            self._file.release()
