"""Finding and opening the files of a data set: what is missing, and what is damaged."""

import bz2
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

__all__ = ["DamagedFileError", "MissingDataError", "find_files", "open_binary"]

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open}


class MissingDataError(FileNotFoundError):
    """Files of a data set are not there; the message says which, and where to get them."""


class DamagedFileError(ValueError):
    """A file is there but not what it should be; the message names it."""

    def __init__(self, path: Path, reason: object) -> None:
        # The arguments are what an exception is pickled by between processes.
        super().__init__(path, str(reason) or type(reason).__name__)

    def __str__(self) -> str:
        return f"{self.args[0]} is damaged or not in the expected format: {self.args[1]}"


def find_files(data_set: str, folder: Path, names: Sequence[str], home_page: str, packed: str = "") -> list[Path]:
    """Return the paths of a data set's files, or say all that is missing.

    Args:
        data_set: name of the data set, for the message.
        folder: where the files should be.
        names: names of the files, or of folders.
        home_page: where the data set can be had.
        packed: suffix of a compressed form that is taken instead of a file that is not there, ".gz" or ".bz2".

    Returns:
        One path for each name.

    Raises:
        MissingDataError: if anything is missing.
    """
    found, missing = [], []
    for name in names:
        candidates = [folder / name, folder / (name + packed)] if packed else [folder / name]
        path = next((path for path in candidates if path.exists()), None)
        if path is None:
            missing.append(name)
        else:
            found.append(path)
    if missing:
        either = f" (each also as {packed})" if packed else ""
        raise MissingDataError(
            f"{data_set}: {folder} has no {', '.join(missing)}{either}. Get the data set from {home_page} and put it "
            "there, or name its folder with --data.init_args.data_dir."
        )
    return found


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, unpacking .gz and .bz2 on the way.

    Args:
        path: the file.
    """
    opener: Any = _OPENERS.get(path.suffix, open)
    return cast(BinaryIO, opener(path, "rb"))
