"""The fields of a message that vary in size: tickets, hyperparameters, the presence bitmap, counts, a text."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import isfinite
from typing import TypeAlias

__all__ = [
    "COUNT_BYTES",
    "HYPERPARAM_BYTES",
    "MAX_COUNTS",
    "MAX_HYPERPARAMS",
    "MAX_PRESENT_BYTES",
    "MAX_RANGES",
    "MAX_TEXT_BYTES",
    "RANGE_BYTES",
    "Bytes",
    "WireError",
    "fit_text",
    "pack_bitmap",
    "pack_counts",
    "pack_hyperparams",
    "pack_ranges",
    "unpack_bitmap",
    "unpack_counts",
    "unpack_hyperparams",
    "unpack_ranges",
]

MAX_HYPERPARAMS = 1 << 15
MAX_PRESENT_BYTES = 1 << 20
MAX_TEXT_BYTES = 16 << 10
HYPERPARAM_BYTES = 8
MAX_COUNTS = 1 << 8
COUNT_BYTES = 8
# Batches of one update that do not follow each other make a range each.
MAX_RANGES = 1 << 16
RANGE_BYTES = 16

_RANGE = struct.Struct("<QQ")
# More than any run draws; the length of every range up to it is a size that Python can tell.
_MAX_TICKET = 1 << 62

Bytes: TypeAlias = bytes | bytearray | memoryview


class WireError(RuntimeError):
    """Bytes that are no message of this protocol, or a message that has no place in it."""


def pack_bitmap(flags: Sequence[bool]) -> bytes:
    """Packs one bit per flag, least significant bit first, the last byte filled up with zeros.

    Args:
        flags: the flags.

    Returns:
        The bitmap.

    Examples:
        >>> pack_bitmap([True, False, True]).hex()
        '05'
    """
    digits = "".join(["1" if flag else "0" for flag in reversed(flags)])
    return int(digits or "0", 2).to_bytes((len(flags) + 7) // 8, "little")


def unpack_bitmap(data: Bytes, count: int) -> list[bool]:
    """Unpacks what `pack_bitmap` packed.

    Args:
        data: the bitmap.
        count: the number of flags that it must hold.

    Returns:
        The flags.

    Raises:
        WireError: if the length does not fit the count, or a bit past the last flag is set.

    Examples:
        >>> unpack_bitmap(bytes([5]), 3)
        [True, False, True]
    """
    if len(data) != (count + 7) // 8:
        raise WireError(f"A bitmap of {count} flags has {(count + 7) // 8} bytes, and {len(data)} arrived.")
    bits = int.from_bytes(data, "little")
    if bits >> count:
        raise WireError(f"A bitmap of {count} flags has bits set past the last of them.")
    return [digit == "1" for digit in reversed(f"{bits:0{count}b}")] if count else []


def pack_hyperparams(values: Sequence[float]) -> bytes:
    """Packs hyperparameters as doubles.

    Args:
        values: the numbers.

    Returns:
        Eight bytes for each.

    Raises:
        WireError: if one is not finite or no number.

    Examples:
        >>> unpack_hyperparams(pack_hyperparams([0.5, 0.9]), 2)
        (0.5, 0.9)
    """
    try:
        data = struct.pack(f"<{len(values)}d", *values)
    except struct.error as error:
        raise WireError(f"Hyperparameters must be numbers: {error}.") from error
    unpack_hyperparams(data, len(values))
    return data


def unpack_hyperparams(data: Bytes, count: int) -> tuple[float, ...]:
    """Unpacks what `pack_hyperparams` packed.

    Args:
        data: the packed numbers.
        count: how many it must hold.

    Returns:
        The numbers.

    Raises:
        WireError: if it holds more or fewer, or one is not finite.
    """
    if len(data) != count * HYPERPARAM_BYTES:
        raise WireError(f"It sends {len(data) // HYPERPARAM_BYTES} hyperparameters, the holder has {count}.")
    values = struct.unpack(f"<{count}d", data)
    if not all(map(isfinite, values)):
        raise WireError(f"Hyperparameters must be finite, and these are not: {values}.")
    return values


def pack_counts(counts: Sequence[int]) -> bytes:
    """Packs counts, none of them negative.

    Args:
        counts: the numbers.

    Returns:
        Eight bytes for each.

    Raises:
        WireError: if one is negative, too large or no whole number.

    Examples:
        >>> unpack_counts(pack_counts([3, 0]))
        (3, 0)
    """
    try:
        return struct.pack(f"<{len(counts)}Q", *counts)
    except struct.error as error:
        raise WireError(f"Counts must be whole numbers of 0 and more: {error}.") from error


def unpack_counts(data: Bytes) -> tuple[int, ...]:
    """Unpacks what `pack_counts` packed.

    Args:
        data: the packed numbers, a whole number of them.

    Returns:
        The numbers.
    """
    return struct.unpack(f"<{len(data) // COUNT_BYTES}Q", data)


def pack_ranges(ranges: Sequence[range]) -> bytes:
    """Packs ranges of tickets, none of them empty.

    Args:
        ranges: the ranges.

    Returns:
        Sixteen bytes for each.

    Raises:
        WireError: if one is empty, leaves numbers out, or has a number that is negative or too large.

    Examples:
        >>> unpack_ranges(pack_ranges([range(3, 5), range(9, 10)]))
        (range(3, 5), range(9, 10))
    """
    packed = []
    for tickets in ranges:
        start, stop = tickets.start, tickets.stop
        if not 0 <= start < stop <= _MAX_TICKET or tickets.step != 1:
            raise WireError(f"Tickets must be a range of numbers that follow each other, and not {tickets}.")
        packed.append(_RANGE.pack(start, stop))
    # Most updates have one range.
    return packed[0] if len(packed) == 1 else b"".join(packed)


def unpack_ranges(data: Bytes) -> tuple[range, ...]:
    """Unpacks what `pack_ranges` packed.

    Args:
        data: the packed ranges, a whole number of them.

    Returns:
        The ranges.

    Raises:
        WireError: if one is empty or has a number that is too large.
    """
    ranges = []
    for start, stop in _RANGE.iter_unpack(data):
        if not start < stop <= _MAX_TICKET:
            raise WireError(f"Tickets must be a range that is not empty, and not {range(start, stop)}.")
        ranges.append(range(start, stop))
    return tuple(ranges)


def fit_text(text: str) -> str:
    """Makes any text one that can be sent: unencodable characters replaced, the end cut off if too long.

    Args:
        text: for instance a traceback.

    Returns:
        The text, in at most `MAX_TEXT_BYTES` of UTF-8.

    Examples:
        >>> fit_text("because"), len(fit_text("x" * 10**6)) == MAX_TEXT_BYTES
        ('because', True)
    """
    return text.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore")
