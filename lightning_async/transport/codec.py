"""Messages as bytes: the format of the control connection.

A message is a header of fixed size followed by a trailer. The trailer's sections are ranges of tickets, hyperparameters
of the param groups, the presence bitmap, counts, and a text. Every field is a number, a bitmap or text with a bound of
its own; nothing received is ever unpickled or evaluated (`fields.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_async.transport.fields import (
    COUNT_BYTES,
    HYPERPARAM_BYTES,
    MAX_COUNTS,
    MAX_HYPERPARAMS,
    MAX_PRESENT_BYTES,
    MAX_RANGES,
    MAX_TEXT_BYTES,
    RANGE_BYTES,
    Bytes,
    WireError,
    pack_ranges,
    unpack_ranges,
)
from lightning_async.transport.layouts import HEADER_BYTES, NO_SECTIONS, Layout, layout_of_code, layout_of_type
from lightning_async.transport.message import Kind, Message

__all__ = [
    "HEADER_BYTES",
    "MAX_TRAILER_BYTES",
    "PROTOCOL_VERSION",
    "Header",
    "ProtocolVersionError",
    "assemble",
    "decode",
    "decode_header",
    "encode",
    "read_message",
]

PROTOCOL_VERSION = 5
MAX_TRAILER_BYTES = (
    MAX_RANGES * RANGE_BYTES
    + MAX_HYPERPARAMS * HYPERPARAM_BYTES
    + MAX_PRESENT_BYTES
    + MAX_COUNTS * COUNT_BYTES
    + MAX_TEXT_BYTES
)

_MAGIC = b"LASY"
_BEGINNING = struct.pack("<4sH", _MAGIC, PROTOCOL_VERSION)
_KIND_AT = len(_BEGINNING)


class ProtocolVersionError(WireError):
    """The peer speaks another version of the protocol."""


class Header(NamedTuple):
    """A checked header.

    Args:
        layout: how it is to be read.
        numbers: all that is in it.
        trailer_bytes: bytes to receive after it; never more than `MAX_TRAILER_BYTES`.
    """

    layout: Layout
    numbers: tuple[Any, ...]
    trailer_bytes: int

    @property
    def kind(self) -> Kind:
        """The kind of the message."""
        return self.layout.kind


def encode(message: Message) -> bytes:
    """Turns a message into its header and trailer.

    Args:
        message: what to send.

    Returns:
        `HEADER_BYTES` and whatever the trailer takes.

    Raises:
        WireError: if a field is out of its range or of another type.

    Examples:
        >>> from lightning_async.transport.message import Push
        >>> message = Push(worker=3, version=17, tickets=(range(4, 6),), present=bytes([5]))
        >>> data = encode(message)
        >>> decode(data[:HEADER_BYTES], data[HEADER_BYTES:]) == message
        True
    """
    layout = layout_of_type.get(type(message))
    if layout is None:
        raise WireError(f"{message!r} is no message.")
    try:
        numbers, (tickets, hyperparams, present, counts, text) = layout.split(message)
        encoded_text = text.encode()
        hyperparam_count, rest = divmod(len(hyperparams), HYPERPARAM_BYTES)
        if rest:
            raise WireError(f"{len(hyperparams)} bytes are no whole number of hyperparameters.")
        count_count, rest = divmod(len(counts), COUNT_BYTES)
        if rest:
            raise WireError(f"{len(counts)} bytes are no whole number of counts.")
        sizes = (hyperparam_count, count_count, len(tickets), len(present), len(encoded_text))
        _check_sizes(*sizes)
        header = layout.header.pack(_MAGIC, PROTOCOL_VERSION, layout.kind, message.worker, *sizes, *numbers)
        return header + pack_ranges(tickets) + hyperparams + present + counts + encoded_text
    except (struct.error, OverflowError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise WireError(f"{layout.kind.name} cannot be encoded: {error!r}.") from error


def decode_header(header: Bytes) -> Header:
    """Checks and reads a header.

    Args:
        header: exactly `HEADER_BYTES` bytes.

    Returns:
        Its fields; `Header.trailer_bytes` says how much to receive next.

    Raises:
        ProtocolVersionError: if the peer speaks another version.
        WireError: if the bytes are no header, or a number in them is out of its range.
    """
    if len(header) != HEADER_BYTES:
        raise WireError(f"A header has {HEADER_BYTES} bytes, and {len(header)} arrived.")
    if header[:_KIND_AT] != _BEGINNING:
        _refuse_beginning(bytes(header[:_KIND_AT]))
    layout = layout_of_code.get(header[_KIND_AT])
    if layout is None:
        raise WireError(f"There is no kind of message with the number {header[_KIND_AT]}.")
    numbers = layout.header.unpack(header)
    _, _, _, _, hyperparam_count, count_count, range_count, present_bytes, text_bytes = numbers[:9]
    _check_sizes(hyperparam_count, count_count, range_count, present_bytes, text_bytes)
    if int.from_bytes(header, "little") & layout.unused:
        raise WireError(f"{layout.kind.name} has something where it must have zeros.")
    trailer_bytes = (
        range_count * RANGE_BYTES
        + hyperparam_count * HYPERPARAM_BYTES
        + present_bytes
        + count_count * COUNT_BYTES
        + text_bytes
    )
    return Header(layout, numbers, trailer_bytes)


def decode(header: Bytes, trailer: Bytes) -> Message:
    """Turns a header and its trailer back into a message.

    Args:
        header: exactly `HEADER_BYTES` bytes.
        trailer: exactly as many bytes as the header announces.

    Returns:
        The message.

    Raises:
        WireError: if the bytes are no message of this protocol.
    """
    return assemble(decode_header(header), trailer)


def read_message(receive_exactly: Callable[[int], Bytes]) -> Message:
    """Receives one message.

    Args:
        receive_exactly: returns the next n bytes of the stream. It is asked for `HEADER_BYTES` and then, if
            the message has a trailer, for at most `MAX_TRAILER_BYTES`. Its own errors pass through.

    Returns:
        The message.

    Raises:
        WireError: if the bytes are no message of this protocol.

    Examples:
        >>> import io
        >>> from lightning_async.transport.message import Abort, Beat
        >>> stream = io.BytesIO(encode(Beat(worker=1)) + encode(Abort(worker=2, reason="no")))
        >>> read_message(stream.read), read_message(stream.read)
        (Beat(worker=1, waits_in=''), Abort(worker=2, reason='no'))
    """
    header = decode_header(receive_exactly(HEADER_BYTES))
    trailer_bytes = header.trailer_bytes
    return assemble(header, receive_exactly(trailer_bytes) if trailer_bytes else b"")


def assemble(header: Header, trailer: Bytes) -> Message:
    """Turns a header that `decode_header` has read, and its trailer, into a message.

    Args:
        header: the header.
        trailer: exactly as many bytes as the header announces.

    Returns:
        The message.

    Raises:
        WireError: if the trailer does not fit, or something in it or in the header is out of its range.
    """
    layout, numbers, trailer_bytes = header
    if len(trailer) != trailer_bytes:
        raise WireError(f"{layout.kind.name} announced a trailer of {trailer_bytes} bytes, and {len(trailer)} arrived.")
    worker, hyperparam_count, count_count, range_count, present_bytes, text_bytes = numbers[3:9]
    if not trailer_bytes:
        return layout.build(worker, numbers[9:], NO_SECTIONS)
    hyperparams_at = range_count * RANGE_BYTES
    present_at = hyperparams_at + hyperparam_count * HYPERPARAM_BYTES
    counts_at = present_at + present_bytes
    text_at = counts_at + count_count * COUNT_BYTES
    try:
        text = str(trailer[text_at:], "utf-8") if text_bytes else ""
    except UnicodeDecodeError as error:
        raise WireError(f"The text of {layout.kind.name} is not UTF-8: {error}.") from error
    sections = (
        unpack_ranges(trailer[:hyperparams_at]),
        bytes(trailer[hyperparams_at:present_at]),
        bytes(trailer[present_at:counts_at]),
        bytes(trailer[counts_at:text_at]),
        text,
    )
    return layout.build(worker, numbers[9:], sections)


def _refuse_beginning(beginning: bytes) -> None:
    magic, protocol = struct.unpack("<4sH", beginning)
    if magic != _MAGIC:
        raise WireError(f"Expected a lightning_async message, which starts with {_MAGIC!r}, not with {magic!r}.")
    raise ProtocolVersionError(
        f"The peer speaks protocol version {protocol}, this side version {PROTOCOL_VERSION}. "
        "Install the same version of lightning_async on every host."
    )


def _check_sizes(
    hyperparam_count: int, count_count: int, range_count: int, present_bytes: int, text_bytes: int
) -> None:
    if hyperparam_count > MAX_HYPERPARAMS:
        raise WireError(
            f"{hyperparam_count} hyperparameters are more than the {MAX_HYPERPARAMS} that a message may have."
        )
    if count_count > MAX_COUNTS:
        raise WireError(f"{count_count} counts are more than the {MAX_COUNTS} that a message may have.")
    if range_count > MAX_RANGES:
        raise WireError(f"{range_count} ranges of tickets are more than the {MAX_RANGES} that a message may have.")
    if present_bytes > MAX_PRESENT_BYTES:
        raise WireError(f"A bitmap of {present_bytes} bytes is longer than the {MAX_PRESENT_BYTES} allowed.")
    if text_bytes > MAX_TEXT_BYTES:
        raise WireError(f"A text of {text_bytes} bytes is longer than the {MAX_TEXT_BYTES} allowed.")
