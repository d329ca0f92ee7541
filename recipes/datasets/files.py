"""Finding and opening the files of a data set: what is missing, what is damaged, and pickles that run nothing."""

import bz2
import gzip
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np

__all__ = ["DamagedFileError", "MissingDataError", "find_files", "load_pickle", "open_binary"]

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open}


class MissingDataError(FileNotFoundError):
    """Files of a data set are not there; the message says which, and where to get them."""


class DamagedFileError(ValueError):
    """A file is there but not what it should be; the message names it."""

    def __init__(self, path: Path, reason: object) -> None:
        # The arguments are what an exception is pickled by between processes.
        super().__init__(path, str(reason))

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


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dict of numpy arrays, lists, strings and numbers, as Python 2 or 3 wrote it.

    Nothing else is unpickled: a pickle can otherwise run any code.

    Args:
        path: the file.

    Returns:
        The dict, with keys as `str`.

    Raises:
        DamagedFileError: if the file is no such pickle, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            # What Python 2 wrote has strings of bytes.
            content = _ArraysOnly(io.BytesIO(file.read()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"holds a {type(content).__name__} instead of a dict")
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}
    # A damaged pickle can raise whatever its bytes happen to call for.
    except Exception as error:
        raise DamagedFileError(path, error or type(error).__name__) from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and Python's own plain types, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = cast(tuple[Any, ...], np.empty(0).__reduce__())[0]
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            # The private module that it is pickled under has been renamed.
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy.core.numeric", "_frombuffer"): _from_buffer,
            ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        }
        if (module, name) in known:
            return known[module, name]
        # How Python 3 writes bytes for Python 2.
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"refuses to unpickle {module}.{name}; arrays, lists, strings and numbers only")


def _from_buffer(buffer: Any, dtype: "np.dtype[Any]", shape: tuple[int, ...], order: Literal["C", "F"]) -> Any:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"refuses the encoding {encoding!r}")
    return text.encode("latin1")
