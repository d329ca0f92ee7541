"""Where the ranks of a run tell a process that watches it from outside who they are.

A forked rank has no variable in its environment that another process could read, so each leaves a file. Nothing is
written unless `FOLDER` is in the environment.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["FOLDER", "announce_rank", "announce_training", "is_training", "ranks_announced"]

FOLDER = "LIGHTNING_ASYNC_WHEREABOUTS"
"""The variable that names the folder."""

_TRAINING = "training"


def announce_rank(rank: int) -> None:
    """Tells that this process is a rank."""
    if folder := os.environ.get(FOLDER):
        # Named by the process: a rank that is started again overwrites nothing, and nobody reads half a name.
        unfinished = Path(folder) / f".{os.getpid()}"
        unfinished.write_text(str(rank))
        unfinished.rename(Path(folder) / str(os.getpid()))


def announce_training() -> None:
    """Tells that the ranks train."""
    if folder := os.environ.get(FOLDER):
        (Path(folder) / _TRAINING).touch()


def ranks_announced(folder: Path) -> dict[int, int]:
    """The processes that have said to be ranks, also those that have ended since: pid -> rank.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     os.environ[FOLDER] = folder
        ...     announce_rank(3)
        ...     del os.environ[FOLDER]
        ...     ranks_announced(Path(folder)) == {os.getpid(): 3}, is_training(Path(folder))
        (True, False)
    """
    return {int(note.name): int(note.read_text()) for note in folder.iterdir() if note.name.isdigit()}


def is_training(folder: Path) -> bool:
    """Whether the ranks have begun to train."""
    return (folder / _TRAINING).exists()
