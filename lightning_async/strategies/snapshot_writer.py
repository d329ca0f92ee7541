"""Writes snapshots in a thread of its own, one at a time."""

from __future__ import annotations

import threading
import time
from typing import Any

from lightning_async.runtime.threads import use_one_thread
from lightning_async.strategies.snapshot_file import SnapshotFile

__all__ = ["SnapshotWriter"]


class SnapshotWriter:
    """Writes to one file in the background; what there is to say of it is asked for, and said by the main thread.

    Args:
        file: where snapshots go.

    Attributes:
        written: how many were written.
        segment: what the segment is called that the last one of them is of.
        rests_until_s: by the monotonic clock, the time at which writing will have taken a fifth of the time since the
            last one was begun.
    """

    def __init__(self, file: SnapshotFile) -> None:
        self._file = file
        self._thread: threading.Thread | None = None
        self._lines: list[str] = []
        # A disk that stays full is told of once.
        self._has_failed = False
        self._was_disturbed = False
        self.written = 0
        self.segment = ""
        self.rests_until_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, checkpoint: dict[str, Any], segment: str) -> None:
        """Begins to write what nobody changes any more; nothing may be under way."""
        self._thread = threading.Thread(target=self._write, args=(checkpoint, segment), name="snapshot", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """Waits for what is under way, and gives it up if that takes longer."""
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._file.give_up()
            self._lines.append(
                f"The snapshot was not written to {self._file.path} within {timeout_s:g} s after the fit's end, and is "
                "given up. The one before it stays."
            )

    def take_lines(self) -> list[str]:
        """What the user should know since this was last asked."""
        lines, self._lines = self._lines, []
        return lines

    def _write(self, checkpoint: dict[str, Any], segment: str) -> None:
        use_one_thread()
        begun_s = time.monotonic()
        try:
            disturbed = self._file.write(checkpoint)
        except Exception as error:
            if not self._has_failed:
                self._lines.append(
                    f"A snapshot could not be written to {self._file.path}: {type(error).__name__}: {error}. Training "
                    "goes on, the snapshot before it stays, and the next one is tried as usual."
                )
            self._has_failed = True
            return
        if self._has_failed:
            self._lines.append(f"Snapshots are written to {self._file.path} again.")
        if disturbed and not self._was_disturbed:
            self._was_disturbed = True
            self._lines.append(
                f"Another run writes its snapshots to {self._file.path}, too, so that neither finds its own again. "
                "Give each run a snapshot_path, or a default_root_dir, of its own."
            )
        self._has_failed = False
        self.rests_until_s = begun_s + 5 * (time.monotonic() - begun_s)
        self.written += 1
        self.segment = segment
