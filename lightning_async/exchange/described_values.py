"""Values with tensors in them, on their way to another process: JSON first, then the tensors' bytes, in its order.

Nothing that arrives is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError

__all__ = ["bytes_of", "describe", "rebuild", "receive_tensors"]

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.complex128,
        ),
    )
}


def describe(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON values; its tensors are appended to ``tensors``.

    Raises:
        TypeError: if there is something in it that is no tensor, number, text, None, dict, list or tuple.

    Examples:
        >>> tensors = []
        >>> described = describe({0: {"exp_avg": torch.ones(2)}, "calls": (1, None)}, tensors)
        >>> rebuild(described, lambda dtype, shape: tensors.pop(0))
        {0: {'exp_avg': tensor([1., 1.])}, 'calls': (1, None)}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or str(value.dtype) not in _DTYPES:
            raise TypeError(f"a tensor of {value.dtype}, {value.layout}")
        tensors.append(value)
        return {"tensor": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"items": [[describe(item, tensors) for item in pair] for pair in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe(item, tensors) for item in value]}
    raise TypeError(f"a {type(value).__name__}")


def rebuild(described: Any, take: Callable[[str, list[int]], Tensor]) -> Any:
    """Inverse of `describe`.

    Args:
        described: what it returned.
        take: returns the next tensor, of a dtype and a shape.

    Raises:
        WireError: if it is no such description.
    """
    if not isinstance(described, dict):
        return described
    if "tensor" in described:
        return take(described["tensor"], described["shape"])
    if "items" in described:
        return {rebuild(key, take): rebuild(value, take) for key, value in described["items"]}
    for kind in (list, tuple):
        if kind.__name__ in described:
            return kind(rebuild(item, take) for item in described[kind.__name__])
    raise WireError("the description of what comes cannot be read")


def receive_tensors(connection: ControlConnection, stall_s: float) -> Callable[[str, list[int]], Tensor]:
    """What `rebuild` takes tensors with that follow over a connection.

    Args:
        connection: to the other side.
        stall_s: seconds without a byte moved after which it is lost.
    """

    def take(dtype: str, shape: list[int]) -> Tensor:
        tensor = torch.empty(shape, dtype=_DTYPES[dtype])
        connection.receive_payload(bytes_of(tensor), stall_s)
        return tensor

    return take


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
