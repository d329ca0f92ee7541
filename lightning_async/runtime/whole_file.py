"""A file that is replaced as a whole: whatever happens while it is written, the one before or the new one is there."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["WholeFile"]

log = logging.getLogger(__name__)

# Python's lock is free while a piece is written, so that the workers are served.
_PIECE_BYTES = 1 << 20
_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EISDIR, errno.EACCES)


class WholeFile:
    """A checkpoint's file, written beside its place and renamed when it is on the disk.

    Args:
        path: where it is.

    Attributes:
        path: the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Lightning takes what has "last" or "ckpt_" in its name for a checkpoint, so no name of a user's is in it.
        self._prefix = f".async-{_digest(path.name)}-"
        self._host = f"{self._prefix}{_digest(socket.gethostname())}-"
        self._part = path.with_name(f"{self._host}{os.getpid()}.part")
        self._is_given_up = False

    def give_up(self) -> None:
        """Has what is being written by another thread fail."""
        self._is_given_up = True

    def remove_leftovers(self, of_all_hosts: bool = False) -> None:
        """Removes what processes have left that were killed while they wrote.

        Args:
            of_all_hosts: also what those of other hosts have, of which it is not known whether they still write.
        """
        for part in self.path.parent.glob(f"{self._prefix}*.part"):
            if of_all_hosts or (part.name.startswith(self._host) and _is_gone(part.stem[len(self._host) :])):
                part.unlink(missing_ok=True)

    def write(self, checkpoint: dict[str, Any], replace: Callable[[Path, Path], None] = os.replace) -> None:
        """Replaces the file.

        Args:
            checkpoint: whatever ``torch.save`` takes.
            replace: puts a file in the place of another.

        Raises:
            OSError: if it cannot be written, the disk being full, for instance; the file that was there stays.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._write_part(checkpoint)
            replace(self._part, self.path)
        except BaseException:
            self._part.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)

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


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _is_gone(pid: str) -> bool:
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _sync_folder(folder: Path) -> None:
    """Has the new name outlive a power cut where the file system can do that; the file is in its place already."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError as error:
        log.debug("%s may be written to and not read: %s", folder, error)
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and FUSE file systems: their folders are no files.
        if error.errno not in _NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(descriptor)
