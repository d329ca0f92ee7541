"""An optimizer's state on its way from the holder to a rank that has asked for it, over a connection of its own.

It is no collective: any rank asks when it wants to, and the listener's thread for that peer answers. A description
in JSON goes first, then the bytes of the tensors, in its order; nothing that arrives is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder.held_state import StateByPlace
from lightning_async.runtime.handshake import STATE, Address, handshake
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError, fit_text
from lightning_async.transport.message import Refuse, Welcome

__all__ = ["DTYPES", "bytes_of", "describe_state", "fetch_state", "rebuild_state", "send_state"]

# Room for a million tensors.
_MAX_DESCRIPTION_BYTES = 256 << 20
DTYPES = {
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


def describe_state(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON values; its tensors are appended to ``tensors``.

    Raises:
        TypeError: if there is something in it that is no tensor, number, text, None, dict, list or tuple.

    Examples:
        >>> tensors = []
        >>> described = describe_state({0: {"exp_avg": torch.ones(2)}, "calls": (1, None)}, tensors)
        >>> rebuild_state(json.loads(json.dumps(described)), lambda dtype, shape: tensors.pop(0))
        {0: {'exp_avg': tensor([1., 1.])}, 'calls': (1, None)}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or str(value.dtype) not in DTYPES:
            raise TypeError(f"a tensor of {value.dtype}, {value.layout}")
        tensors.append(value)
        return {"tensor": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"items": [[describe_state(item, tensors) for item in pair] for pair in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe_state(item, tensors) for item in value]}
    raise TypeError(f"a {type(value).__name__}")


def rebuild_state(described: Any, take: Callable[[str, list[int]], Tensor]) -> Any:
    """Inverse of `describe_state`.

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
        return {rebuild_state(key, take): rebuild_state(value, take) for key, value in described["items"]}
    for kind in (list, tuple):
        if kind.__name__ in described:
            return kind(rebuild_state(item, take) for item in described[kind.__name__])
    raise WireError("the description of an optimizer's state cannot be read")


def send_state(connection: ControlConnection, read: Callable[[], StateByPlace], stall_s: float = 60.0) -> None:
    """Answers a peer who has asked for a state, and closes the connection.

    Args:
        connection: to the peer.
        read: returns a copy of the state, in host memory.
        stall_s: seconds in which the peer takes nothing after which it is lost.

    Raises:
        ChannelClosedError: if the peer is gone.
    """
    tensors: list[Tensor] = []
    try:
        text = json.dumps(describe_state(dict(read()), tensors)).encode()
    except (TypeError, IndexError) as error:
        reason = f"the optimizer's state has {error} in it, which cannot be sent to another rank; read it on rank 0"
        connection.send(Refuse(reason=fit_text(reason)))
    else:
        connection.settimeout(None)
        connection.survive_cuts(stall_s)
        connection.send_payload(Welcome(offer=str(len(text))), memoryview(text), stall_s)
        for tensor in tensors:
            connection.send_payload(None, bytes_of(tensor.contiguous()), stall_s)
    finally:
        connection.close()


def fetch_state(address: Address, rank: int, optimizer: int) -> StateByPlace:
    """Asks the holder for an optimizer's state.

    Args:
        address: of the holder's listener.
        rank: this rank.
        optimizer: which one.

    Returns:
        What it keeps for each parameter, in host memory.

    Raises:
        HandshakeError: if the holder refuses, with its reason.
        ChannelClosedError: if it cannot be reached, or says nothing for `worker_timeout`.
        WireError: if its answer is none.
    """
    connection, size = handshake(address, rank, STATE, optimizer=optimizer)
    try:
        connection.survive_cuts(address.timeout_s)
        if not 0 < int(size) <= _MAX_DESCRIPTION_BYTES:
            raise WireError(f"the holder describes an optimizer's state in {size} bytes")
        text = bytearray(int(size))
        connection.receive_payload(memoryview(text), address.timeout_s)

        def take(dtype: str, shape: list[int]) -> Tensor:
            tensor = torch.empty(shape, dtype=DTYPES[dtype])
            connection.receive_payload(bytes_of(tensor), address.timeout_s)
            return tensor

        state: StateByPlace = rebuild_state(json.loads(text), take)
        return state
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"the holder's answer is no optimizer's state: {error!r}") from error
    finally:
        connection.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
