"""How each kind of message lies in a header and a trailer.

A header begins alike for every kind: the kind, the worker, the sizes of the trailer's sections. The kind's own numbers
come next. What a kind does not use must be zero, so that no two headers say the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import isfinite
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from lightning_async.transport.fields import WireError
from lightning_async.transport.message import (
    Abort,
    Ack,
    Beat,
    Challenge,
    Close,
    Draw,
    Evict,
    Goodbye,
    Hello,
    Kind,
    Leave,
    Message,
    Outcome,
    Parameters,
    Part,
    Proof,
    Pull,
    Push,
    Read,
    Refuse,
    Release,
    Skip,
    Tickets,
    Welcome,
    kind_of,
)

__all__ = ["HEADER_BYTES", "NO_SECTIONS", "Layout", "Numbers", "Sections", "layout_of_code", "layout_of_type"]

HEADER_BYTES = 128

# magic, protocol, kind, worker, hyperparameters, counts, ranges, bitmap bytes, text bytes. The first six bytes and the
# size of 128 stay the same in every protocol version, so that each side can read the other's first header and name the
# mismatch.
_START = "<4sHBxIHHIII"
# Bytes of each section's size in there.
_SIZES = {"hyperparams": 2, "counts": 2, "tickets": 4, "present": 4, "text": 4}

# The numbers of a header that are its kind's own, in their order.
Numbers: TypeAlias = tuple[Any, ...]
# A trailer: tickets, hyperparameters, presence bitmap, counts, text. A plain tuple, since there are four for each
# update.
Sections: TypeAlias = tuple[tuple[range, ...], bytes, bytes, bytes, str]
NO_SECTIONS: Sections = ((), b"", b"", b"", "")
_TICKETS: Final = 0
_COUNTS: Final = 3
_TEXT: Final = 4

_CODE_OF_DTYPE: dict[torch.dtype | None, int] = {
    None: 0,
    torch.float32: 1,
    torch.float64: 2,
    torch.float16: 3,
    torch.bfloat16: 4,
}
_DTYPE_OF_CODE = {code: dtype for dtype, code in _CODE_OF_DTYPE.items()}
_OUTCOME_OF_CODE = {int(outcome): outcome for outcome in Outcome}


class Layout(NamedTuple):
    """How one kind of message becomes a header and a trailer.

    Args:
        kind: the kind.
        header: the whole header.
        unused: the bits of the header, as a little-endian number, that must be zero.
        split: gives a message's own numbers and its sections.
        build: makes a message of the worker, the numbers and the sections.
    """

    kind: Kind
    header: struct.Struct
    unused: int
    split: Callable[[Any], tuple[Numbers, Sections]]
    build: Callable[[int, Numbers, Sections], Message]


def _layout(
    kind: type[Message],
    numbers: str = "",
    sections: tuple[str, ...] = (),
    split: Callable[[Any], tuple[Numbers, Sections]] = lambda message: ((), NO_SECTIONS),
    build: Callable[[int, Numbers, Sections], Message] | None = None,
) -> Layout:
    """The layout of a kind of message; by default of one that has nothing but a worker.

    Args:
        kind: the class.
        numbers: `struct` codes of its own numbers.
        sections: the sections that it has.
        split: see `Layout`.
        build: see `Layout`.
    """
    pad = HEADER_BYTES - struct.calcsize(_START + numbers)
    sizes = b"".join((b"\xff" if name in sections else b"\0") * size for name, size in _SIZES.items())
    # A flag is a byte, of which one bit is used.
    own = b"".join(b"\1" if code == "?" else b"\xff" * struct.calcsize("<" + code) for code in numbers)
    used = b"\xff" * 7 + b"\0" + b"\xff" * 4 + sizes + own + b"\0" * pad
    return Layout(
        kind_of(kind),
        struct.Struct(f"{_START}{numbers}{pad}x"),
        int.from_bytes(bytes(~byte & 0xFF for byte in used), "little"),
        split,
        build or (lambda worker, numbers, sections: kind(worker)),
    )


def _text(text: str) -> Sections:
    return (), b"", b"", b"", text


def _counts(counts: bytes) -> Sections:
    return (), b"", b"", counts, ""


def _check_seconds(waited_s: float) -> None:
    if not (isfinite(waited_s) and waited_s >= 0.0):
        raise WireError(f"A time must be finite and not negative, and waited_s is {waited_s}.")


def _dtype_of(code: int) -> torch.dtype | None:
    try:
        return _DTYPE_OF_CODE[code]
    except KeyError:
        raise WireError(f"There is no payload type with the number {code}.") from None


def _outcome_of(code: int) -> Outcome:
    try:
        return _OUTCOME_OF_CODE[code]
    except KeyError:
        raise WireError(f"There is no outcome of a push with the number {code}.") from None


def _start_and_count(tickets: range) -> tuple[int, int]:
    if tickets.step != 1:
        raise WireError(f"Tickets must follow each other, and {tickets} leaves some out.")
    return tickets.start, len(tickets)


def _split_push(push: Push) -> tuple[Numbers, Sections]:
    _, optimizer, version, tickets, samples, waited_s, wants, dtype, payload_bytes, *sections, finite = push
    hyperparams, present, counts = sections
    _check_seconds(waited_s)
    numbers = (optimizer, version, samples, waited_s, payload_bytes, wants, _CODE_OF_DTYPE[dtype], not finite)
    return numbers, (tickets, hyperparams, present, counts, "")


def _build_push(worker: int, numbers: Numbers, sections: Sections) -> Push:
    optimizer, version, samples, waited_s, payload_bytes, wants, dtype, spoiled = numbers
    tickets, hyperparams, present, counts, _ = sections
    _check_seconds(waited_s)
    # Positional: keywords take longer.
    return Push(
        worker,
        optimizer,
        version,
        tickets,
        samples,
        waited_s,
        wants,
        _dtype_of(dtype),
        payload_bytes,
        hyperparams,
        present,
        counts,
        not spoiled,
    )


def _split_parameters(message: Parameters) -> tuple[Numbers, Sections]:
    _, version, outcome, tickets, dtype, payload_bytes, counts = message
    start, count = _start_and_count(tickets)
    numbers = (version, start, payload_bytes, count, _OUTCOME_OF_CODE[outcome], _CODE_OF_DTYPE[dtype])
    return numbers, _counts(counts)


def _build_parameters(worker: int, numbers: Numbers, sections: Sections) -> Parameters:
    version, start, payload_bytes, count, outcome, dtype = numbers
    return Parameters(
        worker,
        version,
        _outcome_of(outcome),
        range(start, start + count),
        _dtype_of(dtype),
        payload_bytes,
        sections[_COUNTS],
    )


def _with_text(kind: type[Any]) -> Layout:
    """The layout of a kind whose one field beside the worker is a text."""
    return _layout(
        kind,
        "",
        ("text",),
        lambda message: ((), _text(message[1])),
        lambda worker, _, parts: kind(worker, parts[_TEXT]),
    )


def _with_counts(kind: type[Any]) -> Layout:
    """The layout of a kind whose one field beside the worker is counts."""
    return _layout(
        kind,
        "",
        ("counts",),
        lambda message: ((), _counts(message[1])),
        lambda worker, _, parts: kind(worker, parts[_COUNTS]),
    )


layout_of_type: dict[type, Layout] = {
    Hello: _layout(
        Hello,
        "I",
        ("text",),
        lambda hello: ((hello.incarnation,), _text(hello.claims)),
        lambda worker, numbers, sections: Hello(worker, numbers[0], sections[_TEXT]),
    ),
    Challenge: _with_text(Challenge),
    Proof: _with_text(Proof),
    Welcome: _with_text(Welcome),
    Refuse: _with_text(Refuse),
    Draw: _layout(Draw),
    Tickets: _layout(
        Tickets,
        "QI",
        (),
        lambda message: (_start_and_count(message.tickets), NO_SECTIONS),
        lambda worker, numbers, sections: Tickets(worker, range(numbers[0], sum(numbers))),
    ),
    Pull: _with_counts(Pull),
    Parameters: _layout(Parameters, "QQQIBB", ("counts",), _split_parameters, _build_parameters),
    Push: _layout(Push, "IQQdQ?B?", ("tickets", "hyperparams", "present", "counts"), _split_push, _build_push),
    Skip: _layout(
        Skip,
        "",
        ("tickets", "counts"),
        lambda skip: ((), (skip.tickets, b"", b"", skip.counts, "")),
        lambda worker, numbers, sections: Skip(worker, sections[_TICKETS], sections[_COUNTS]),
    ),
    Release: _layout(
        Release,
        "?",
        ("tickets",),
        lambda release: ((release.stream_over,), (release.tickets, b"", b"", b"", "")),
        lambda worker, numbers, sections: Release(worker, sections[_TICKETS], *numbers),
    ),
    Leave: _layout(Leave),
    Close: _layout(Close),
    Read: _with_counts(Read),
    Ack: _layout(
        Ack,
        "?",
        (),
        lambda ack: ((ack.takes_shortcut,), NO_SECTIONS),
        lambda worker, numbers, sections: Ack(worker, *numbers),
    ),
    Beat: _with_text(Beat),
    Abort: _with_text(Abort),
    Evict: _with_text(Evict),
    Part: _layout(
        Part,
        "QQB",
        (),
        lambda part: ((part.number, part.payload_bytes, _CODE_OF_DTYPE[part.dtype]), NO_SECTIONS),
        lambda worker, numbers, sections: Part(worker, numbers[0], _dtype_of(numbers[2]), numbers[1]),
    ),
    Goodbye: _layout(Goodbye),
}
layout_of_code: dict[int, Layout] = {int(layout.kind): layout for layout in layout_of_type.values()}
