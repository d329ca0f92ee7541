"""A run's snapshot, which takes the place of the run's one before, and of no other run's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_async.runtime.whole_file import WholeFile

__all__ = ["SnapshotFile"]


class SnapshotFile:
    """The file of a run's snapshots.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # What a file of another run is kept as.
        self.previous = path.with_name(f"{path.stem}.previous{path.suffix}")
        self._file = WholeFile(path)
        # Which file this run has written, or begun from.
        self._own: tuple[int, int] | None = None

    def take_over(self) -> None:
        """Counts the file that is there as this run's: the next one replaces it."""
        self._own = self._present()

    def give_up(self) -> None:
        """Has what is being written by another thread fail."""
        self._file.give_up()

    def remove_leftovers(self) -> None:
        """Removes what runs have left that were killed while they wrote."""
        self._file.remove_leftovers(of_all_hosts=True)

    def write(self, checkpoint: dict[str, Any]) -> bool:
        """Replaces the file; what another run has written there is kept as `previous`.

        Args:
            checkpoint: whatever ``torch.save`` takes.

        Returns:
            Whether another run's was there although this one has written before: two runs write to one place.

        Raises:
            OSError: if it cannot be written, the disk being full, for instance; the file that was there stays.
        """
        disturbed = False

        def replace(part: Path, path: Path) -> None:
            nonlocal disturbed
            foreign = (present := self._present()) is not None and present != self._own
            disturbed = foreign and self._own is not None
            if foreign:
                os.replace(path, self.previous)
            self._own = _identity(os.stat(part))
            os.replace(part, path)

        self._file.write(checkpoint, replace)
        return disturbed

    def _present(self) -> tuple[int, int] | None:
        try:
            return _identity(os.stat(self.path))
        except OSError:
            return None


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_ino, found.st_mtime_ns
