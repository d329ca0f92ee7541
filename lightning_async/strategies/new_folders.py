"""Folders that a fit has made and, where it fails before its first update, leaves with nothing in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerStatus

__all__ = ["NewFolders", "log_folders"]


class NewFolders:
    """Folders, and those around them, that do not exist when this is made.

    Args:
        folders: the innermost ones.
        are_used: whether what is in them counts: then everything stays.
    """

    def __init__(self, folders: Iterable[Path], are_used: Callable[[], bool] = lambda: False) -> None:
        missing = {place for folder in folders for place in (folder, *folder.parents) if not place.exists()}
        self._missing = sorted(missing, key=lambda place: len(place.parts), reverse=True)
        self._are_used = are_used

    def remove_empty(self) -> None:
        """Removes those that exist now and have nothing in them."""
        if self._are_used():
            return
        for folder in self._missing:
            try:
                os.rmdir(folder)
            except OSError:  # noqa: PERF203  # it has something in it, or was never made
                continue

    def remove_empty_if_interrupted(self, trainer: Trainer) -> None:
        """The same if the trainer's fit was interrupted."""
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            self.remove_empty()


def log_folders(loggers: Iterable[Any]) -> list[Path]:
    """Where loggers write, as far as they write to folders of their own."""
    folders = (getattr(logger, "log_dir", None) for logger in loggers)
    return [Path(folder) for folder in folders if isinstance(folder, (str, Path)) and folder]
