"""What rank 0 and a shard on another host say to each other, in bytes; nothing that arrives is unpickled.

A frame is the size of a description in JSON, the description, and the bytes of the tensors in it. Classes are named in
it, and only those listed here are made of it.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

from torch import Tensor

from lightning_async.exchange.described_values import bytes_of, describe, rebuild, receive_tensors
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.types import Snapshot
from lightning_async.shards import operations as told
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError

__all__ = ["receive_frame", "send_frame"]

_SIZE = struct.Struct("<Q")
_MAX_DESCRIPTION_BYTES = 256 << 20
_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(told.Attach, told.ApplyPush, told.CopyOut, told.Depart, told.Complete, told.LoadParameters, told.LoadStates),
        *(told.ReadState, told.TakeAdapted, told.TakeSnapshot, told.Restore, Snapshot, Gathered),
    )
}
_NAME, _FIELDS = "class", "fields"


def send_frame(connection: ControlConnection, value: Any, stall_s: float) -> None:
    """Sends a value; by one thread at a time.

    Args:
        connection: to the other side.
        value: of numbers, texts, None, tensors on the host, dicts, lists, tuples, and the classes of this protocol.
        stall_s: seconds in which the other side takes nothing after which it is lost.

    Raises:
        TypeError: if there is something else in it.
        ChannelClosedError: if the other side is gone, or lost.
    """
    tensors: list[Tensor] = []
    text = json.dumps(describe(_plain(value), tensors)).encode()
    connection.send_payload(None, memoryview(_SIZE.pack(len(text)) + text), stall_s)
    for tensor in tensors:
        connection.send_payload(None, bytes_of(tensor.detach().contiguous()), stall_s)


def receive_frame(connection: ControlConnection, stall_s: float) -> Any:
    """Waits for a value, for as long as it takes.

    Args:
        connection: to the other side.
        stall_s: seconds without a byte of what has begun to come after which the other side is lost.

    Raises:
        ChannelClosedError: if the other side is gone, or lost.
        WireError: if what comes is no frame.
    """
    head = bytearray(_SIZE.size)
    connection.receive_bytes(memoryview(head))
    (size,) = _SIZE.unpack(head)
    if not 0 < size <= _MAX_DESCRIPTION_BYTES:
        raise WireError(f"a frame with a description of {size} bytes")
    text = bytearray(size)
    connection.receive_payload(memoryview(text), stall_s)

    try:
        return _rebuilt(rebuild(json.loads(text), receive_tensors(connection, stall_s)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"a frame that cannot be read: {error!r}") from error


def _plain(value: Any) -> Any:
    """A value with dicts in the place of this protocol's classes."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if _CLASSES.get(name := type(value).__name__) is not type(value):
        return value
    fields = tuple(value) if isinstance(value, tuple) else _fields_of(value)
    return {_NAME: name, _FIELDS: tuple(map(_plain, fields))}


def _fields_of(value: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, field.name) for field in dataclasses.fields(value))


def _rebuilt(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_rebuilt, value))
    if not isinstance(value, dict):
        return value
    if value.keys() == {_NAME, _FIELDS}:
        return _CLASSES[value[_NAME]](*map(_rebuilt, value[_FIELDS]))
    return {key: _rebuilt(item) for key, item in value.items()}
