"""A file with a checkpoint that is replaced as a whole: whatever happens while it is written, one can be read."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["SnapshotFile"]

# Python's lock is free while a piece is written, so that the workers are served.
_PIECE_BYTES = 1 << 20


class SnapshotFile:
    """A checkpoint's file, written beside its place and renamed when it is on the disk.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # What a file of another run is kept as.
        self.previous = path.with_name(f"{path.stem}.previous{path.suffix}")
        self._part = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
        # Which file this run has written, or begun from.
        self._own: tuple[int, int] | None = None
        self._is_given_up = False

    def take_over(self) -> None:
        """Counts the file that is there as this run's: the next one replaces it."""
        self._own = self._present()

    def give_up(self) -> None:
        """Has what is being written by another thread fail."""
        self._is_given_up = True

    def remove_leftovers(self) -> None:
        """Removes what runs have left that were killed while they wrote."""
        for part in self.path.parent.glob(f"{self.path.name}.*.part"):
            part.unlink(missing_ok=True)

    def write(self, checkpoint: dict[str, Any]) -> bool:
        """Replaces the file; what another run has written there is kept as `previous`.

        Args:
            checkpoint: whatever ``torch.save`` takes.

        Returns:
            Whether another run's was there although this one has written before: two runs write to one place.

        Raises:
            OSError: if it cannot be written, the disk being full, for instance; the file that was there stays.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._write_part(checkpoint)
            foreign = (present := self._present()) is not None and present != self._own
            disturbed = foreign and self._own is not None
            if foreign:
                os.replace(self.path, self.previous)
            self._own = _identity(os.stat(self._part))
            os.replace(self._part, self.path)
        except BaseException:
            self._part.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)
        return disturbed

    def _write_part(self, checkpoint: dict[str, Any]) -> None:
        descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        pieces = _Pieces(descriptor, lambda: self._is_given_up)
        try:
            sink: Any = pieces  # torch needs no more of a file than these two methods
            torch.save(checkpoint, sink)
            os.fsync(descriptor)
        except RuntimeError:
            # Torch says that the position is not what it should be.
            if pieces.error is not None:
                raise pieces.error from None
            raise
        finally:
            os.close(descriptor)

    def _present(self) -> tuple[int, int] | None:
        try:
            return _identity(os.stat(self.path))
        except OSError:
            return None


class _Pieces:
    """What ``torch.save`` writes to: in pieces, to a file's descriptor."""

    def __init__(self, descriptor: int, is_given_up: Callable[[], bool]) -> None:
        self._descriptor = descriptor
        self._is_given_up = is_given_up
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                if self._is_given_up():
                    raise InterruptedError("given up")
                done += os.write(self._descriptor, view[done : done + _PIECE_BYTES])
        except OSError as error:
            self.error = error
            raise
        return done

    def flush(self) -> None:
        """Keeps nothing back."""


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_ino, found.st_mtime_ns


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
