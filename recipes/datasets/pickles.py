"""Pickled batches, read without running what they may contain."""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from recipes.datasets.files import DamagedFileError

__all__ = ["load_pickle"]


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
        # What Python 2 wrote has strings of bytes.
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"holds a {type(content).__name__} instead of a dict")
        return {
            key.decode() if isinstance(key, bytes) else str(key): value.array if isinstance(value, _Array) else value
            for key, value in content.items()
        }
    # A damaged pickle can raise whatever its bytes happen to call for.
    except Exception as error:
        raise DamagedFileError(path, error) from error


class _DType:
    """What a pickle says of the type of an array's values."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch("[<>|=]?[biuf][1248]", self.code):
            raise pickle.UnpicklingError(f"refuses an array of {self.code}; numbers only")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.code = f"{order}{self.code.lstrip('<>|=')}"


class _Array:
    """What a pickle says of an array.

    Numpy's own functions trust a pickle, and a damaged one can make them crash the process.
    """

    array: "np.ndarray[Any, np.dtype[Any]] | None" = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        self.fill(shape, dtype, "F" if by_columns else "C", data)

    def fill(self, shape: tuple[int, ...], dtype: _DType, order: Any, data: Any) -> None:
        kind = np.dtype(dtype.code)
        if min(shape, default=0) < 0 or len(data) != math.prod(shape) * kind.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        # A copy, so that it can be written to.
        self.array = np.frombuffer(data, kind).reshape(shape, order=order).copy()


class _PlainUnpickler(pickle._Unpickler):
    """Knows arrays and Python's own plain types, and refuses every other class or function.

    In Python, since the one in C sets aside as much memory as a damaged pickle asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        # The private module of the functions has been renamed.
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy", "ndarray":
                return _Array
            case "numpy", "dtype":
                return _DType
            case "numpy.core.multiarray", "_reconstruct":
                return _reconstruct
            case "numpy.core.numeric", "_frombuffer":
                return _from_buffer
            # How Python 3 writes bytes for Python 2.
            case "_codecs", "encode":
                return _encode_latin1
        raise pickle.UnpicklingError(f"refuses to unpickle {module}.{name}; arrays, lists, strings and numbers only")


def _reconstruct(*_: Any) -> _Array:
    # The state that follows says all.
    return _Array()


def _from_buffer(data: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.fill(shape, dtype, order, data)
    return array


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"refuses the encoding {encoding!r}")
    return text.encode("latin1")
