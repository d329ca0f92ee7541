"""The message format of the control connection.

A message is a header of fixed size followed by a trailer: hyperparameters of the param groups, the presence bitmap,
counts, and a text. Every field is a number, a bitmap or text with a bound of its own; nothing received is ever
unpickled or evaluated (`fields.py`). A payload of tensor data travels elsewhere, and its size here is a claim: whoever
posts a receive for it compares it with the session's own size first.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import torch

from lightning_async.transport.fields import (
    COUNT_BYTES,
    HYPERPARAM_BYTES,
    MAX_COUNTS,
    MAX_HYPERPARAMS,
    MAX_PRESENT_BYTES,
    MAX_TEXT_BYTES,
    Bytes,
    WireError,
)

__all__ = [
    "HEADER_BYTES",
    "MAX_TRAILER_BYTES",
    "PROTOCOL_VERSION",
    "Header",
    "Kind",
    "Message",
    "ProtocolVersionError",
    "WireError",
    "assemble",
    "decode",
    "decode_header",
    "encode",
    "read_message",
]

PROTOCOL_VERSION = 3

_MAGIC = b"LASY"
# magic, protocol, kind, dtype, hyperparameters, outcome, worker, incarnation, optimizer, tickets, version, ticket,
# samples, payload bytes, waited_s, bitmap bytes, text bytes, counts. The first six bytes and the size of 128 stay the
# same in every protocol version, so that each side can read the other's first header and name the mismatch.
_HEADER = struct.Struct("<4sHBBHHIIIIQQQQdIIH50x")

HEADER_BYTES = _HEADER.size
MAX_TRAILER_BYTES = MAX_HYPERPARAMS * HYPERPARAM_BYTES + MAX_PRESENT_BYTES + MAX_COUNTS * COUNT_BYTES + MAX_TEXT_BYTES

_CODE_OF_DTYPE: dict[torch.dtype | None, int] = {
    None: 0,
    torch.float32: 1,
    torch.float64: 2,
    torch.float16: 3,
    torch.bfloat16: 4,
}
_DTYPE_OF_CODE = {code: dtype for dtype, code in _CODE_OF_DTYPE.items()}


class ProtocolVersionError(WireError):
    """The peer speaks another version of the protocol."""


class Kind(enum.IntEnum):
    """What a message says. The numbers are the protocol; they are never given a new meaning."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    DRAW = 4
    TICKETS = 5
    PULL = 6
    PARAMETERS = 7
    PUSH = 8
    SKIP = 9
    LEAVE = 10
    CLOSE = 11
    ACK = 12
    BEAT = 13
    ABORT = 14
    GOODBYE = 15
    READ = 16
    RELEASE = 17


_KIND_OF_CODE = {int(kind): kind for kind in Kind}


class Message(NamedTuple):
    """One message; which fields matter depends on its kind.

    A tuple, which is made in a fraction of the time that a frozen dataclass takes, and there are two for each update.

    Attributes:
        kind: what it says.
        worker: rank of the worker that it comes from or goes to.
        incarnation: how many times that worker has been replaced.
        optimizer: index of the optimizer.
        version: PUSH: the version read; PARAMETERS: the version sent.
        ticket: TICKETS, PARAMETERS: the first ticket handed out. PUSH: 1 if the answer is to bring the next tickets.
        tickets: DRAW, TICKETS, PARAMETERS: how many; PUSH, SKIP: how many have been computed;
            RELEASE: how many are given back.
        samples: samples in the batches of these tickets.
        waited_s: PUSH: seconds that the worker's last round trip took.
        outcome: PARAMETERS: what became of the push, a small code. RELEASE: 1 if the worker's stream has ended.
        dtype: element type of the payload; None without one.
        payload_bytes: size of the payload on the data channel.
        groups: the worker's present hyperparameters, of all param groups: what `pack_hyperparams` made of them.
        present: bitmap with one bit per parameter of the optimizer, least significant bit first.
        text: HELLO: JSON; REFUSE, ABORT: the reason; BEAT: the collective that the rank waits in for too long, if any.
        counts: PUSH, PULL, READ, SKIP: what the worker has counted since its last report (see `tally.py`): what
            `pack_counts` made of it; PARAMETERS: the sums over all workers, if the request had any.
    """

    kind: Kind
    worker: int = 0
    incarnation: int = 0
    optimizer: int = 0
    version: int = 0
    ticket: int = 0
    tickets: int = 0
    samples: int = 0
    waited_s: float = 0.0
    outcome: int = 0
    dtype: torch.dtype | None = None
    payload_bytes: int = 0
    groups: bytes = b""
    present: bytes = b""
    text: str = ""
    counts: bytes = b""


class Header(NamedTuple):
    """A checked header: a message's own fields, and the sizes of what follows it."""

    kind: Kind
    dtype: torch.dtype | None
    hyperparam_count: int
    outcome: int
    worker: int
    incarnation: int
    optimizer: int
    tickets: int
    version: int
    ticket: int
    samples: int
    payload_bytes: int
    waited_s: float
    present_bytes: int
    text_bytes: int
    count_count: int

    @property
    def trailer_bytes(self) -> int:
        """Bytes to receive after the header; never more than `MAX_TRAILER_BYTES`."""
        return (
            self.hyperparam_count * HYPERPARAM_BYTES
            + self.present_bytes
            + self.count_count * COUNT_BYTES
            + self.text_bytes
        )


def encode(message: Message) -> bytes:
    """Turns a message into its header and trailer.

    Args:
        message: what to send.

    Returns:
        `HEADER_BYTES` and whatever the trailer takes.

    Raises:
        WireError: if a field is out of its range or of another type.

    Examples:
        >>> message = Message(Kind.PUSH, worker=3, version=17, present=bytes([5]))
        >>> data = encode(message)
        >>> decode(data[:HEADER_BYTES], data[HEADER_BYTES:]) == message
        True
    """
    present, groups, counts = message.present, message.groups, message.counts
    try:
        text = message.text.encode()
        hyperparam_count, rest = divmod(len(groups), HYPERPARAM_BYTES)
        if rest:
            raise WireError(f"{len(groups)} bytes are no whole number of hyperparameters.")
        count_count, rest = divmod(len(counts), COUNT_BYTES)
        if rest:
            raise WireError(f"{len(counts)} bytes are no whole number of counts.")
        _check_sizes(hyperparam_count, len(present), len(text), count_count)
        _check_seconds(message.waited_s)
        header = _HEADER.pack(
            _MAGIC,
            PROTOCOL_VERSION,
            _KIND_OF_CODE[message.kind],
            _CODE_OF_DTYPE[message.dtype],
            hyperparam_count,
            message.outcome,
            message.worker,
            message.incarnation,
            message.optimizer,
            message.tickets,
            message.version,
            message.ticket,
            message.samples,
            message.payload_bytes,
            message.waited_s,
            len(present),
            len(text),
            count_count,
        )
        return header + groups + present + counts + text
    except (struct.error, OverflowError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise WireError(f"{_name(message)} cannot be encoded: {error!r}.") from error


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
    magic, protocol, kind_code, dtype_code, *numbers = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise WireError(f"Expected a lightning_async message, which starts with {_MAGIC!r}, not with {magic!r}.")
    if protocol != PROTOCOL_VERSION:
        raise ProtocolVersionError(
            f"The peer speaks protocol version {protocol}, this side version {PROTOCOL_VERSION}. "
            "Install the same version of lightning_async on every host."
        )
    kind = _KIND_OF_CODE.get(kind_code)
    if kind is None:
        raise WireError(f"There is no kind of message with the number {kind_code}.")
    if dtype_code not in _DTYPE_OF_CODE:
        raise WireError(f"There is no payload type with the number {dtype_code}.")
    fields = Header(kind, _DTYPE_OF_CODE[dtype_code], *numbers)
    _check_sizes(fields.hyperparam_count, fields.present_bytes, fields.text_bytes, fields.count_count)
    _check_seconds(fields.waited_s)
    return fields


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
        >>> stream = io.BytesIO(encode(Message(Kind.BEAT, worker=1)) + encode(Message(Kind.ABORT, text="no")))
        >>> read_message(stream.read).kind.name, read_message(stream.read).text
        ('BEAT', 'no')
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
        WireError: if the trailer does not fit.
    """
    if len(trailer) != header.trailer_bytes:
        raise WireError(
            f"{header.kind.name} announced a trailer of {header.trailer_bytes} bytes, and {len(trailer)} arrived."
        )
    groups, present, counts, text = b"", b"", b"", ""
    if trailer:
        groups_end = header.hyperparam_count * HYPERPARAM_BYTES
        present_end = groups_end + header.present_bytes
        groups = bytes(trailer[:groups_end])
        present = bytes(trailer[groups_end:present_end])
        counts_end = present_end + header.count_count * COUNT_BYTES
        counts = bytes(trailer[present_end:counts_end])
        try:
            text = str(trailer[counts_end:], "utf-8")
        except UnicodeDecodeError as error:
            raise WireError(f"The text of {header.kind.name} is not UTF-8: {error}.") from error
    # Positional, in the order of the class: keywords take longer.
    return Message(
        header.kind,
        header.worker,
        header.incarnation,
        header.optimizer,
        header.version,
        header.ticket,
        header.tickets,
        header.samples,
        header.waited_s,
        header.outcome,
        header.dtype,
        header.payload_bytes,
        groups,
        present,
        text,
        counts,
    )


def _check_sizes(hyperparam_count: int, present_bytes: int, text_bytes: int, count_count: int) -> None:
    if hyperparam_count > MAX_HYPERPARAMS:
        raise WireError(
            f"{hyperparam_count} hyperparameters are more than the {MAX_HYPERPARAMS} that a message may have."
        )
    if present_bytes > MAX_PRESENT_BYTES:
        raise WireError(f"A bitmap of {present_bytes} bytes is longer than the {MAX_PRESENT_BYTES} allowed.")
    if text_bytes > MAX_TEXT_BYTES:
        raise WireError(f"A text of {text_bytes} bytes is longer than the {MAX_TEXT_BYTES} allowed.")
    if count_count > MAX_COUNTS:
        raise WireError(f"{count_count} counts are more than the {MAX_COUNTS} that a message may have.")


def _check_seconds(waited_s: float) -> None:
    if not (isfinite(waited_s) and waited_s >= 0.0):
        raise WireError(f"A time must be finite and not negative, and waited_s is {waited_s}.")


def _name(message: Message) -> str:
    return getattr(message.kind, "name", repr(message.kind))
