"""The control connection's message format: what goes in comes out, and garbage is only ever a WireError."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.transport.fields import (
    MAX_COUNTS,
    MAX_HYPERPARAMS,
    MAX_PRESENT_BYTES,
    MAX_TEXT_BYTES,
    pack_counts,
    pack_hyperparams,
)
from lightning_async.transport.message import (
    HEADER_BYTES,
    MAX_TRAILER_BYTES,
    PROTOCOL_VERSION,
    Kind,
    Message,
    ProtocolVersionError,
    WireError,
    decode,
    decode_header,
    encode,
    read_message,
)

UINT16, UINT32, UINT64 = 2**16 - 1, 2**32 - 1, 2**64 - 1
finite = st.floats(allow_nan=False, allow_infinity=False)
messages = st.builds(
    Message,
    kind=st.sampled_from(Kind),
    worker=st.integers(0, UINT32),
    incarnation=st.integers(0, UINT32),
    optimizer=st.integers(0, UINT32),
    version=st.integers(0, UINT64),
    ticket=st.integers(0, UINT64),
    tickets=st.integers(0, UINT32),
    samples=st.integers(0, UINT64),
    waited_s=st.floats(0, allow_infinity=False),
    outcome=st.integers(0, UINT16),
    dtype=st.sampled_from([None, torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    payload_bytes=st.integers(0, UINT64),
    groups=st.lists(finite, max_size=12).map(pack_hyperparams),
    present=st.binary(max_size=40),
    text=st.text(max_size=40),
    counts=st.lists(st.integers(0, UINT64), max_size=12).map(pack_counts),
)


class Stream:
    """Bytes to receive; records every request. At the end of the bytes it returns fewer, as a file would."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[int] = []

    def receive_exactly(self, count: int) -> bytes:
        self.asked.append(count)
        piece, self.data = self.data[:count], self.data[count:]
        return piece


def patched(data: bytes, layout: str, offset: int, value: Any) -> bytes:
    result = bytearray(data)
    struct.pack_into(layout, result, offset, value)
    return bytes(result)


# -------------------------------------------------------------------------------------------- round trips


@given(message=messages)
def test_every_message_comes_out_as_it_went_in(message: Message) -> None:
    data = encode(message)

    assert decode(data[:HEADER_BYTES], data[HEADER_BYTES:]) == message
    assert decode(memoryview(data)[:HEADER_BYTES], bytearray(data[HEADER_BYTES:])) == message


@given(sent=st.lists(messages, max_size=4))
def test_messages_follow_each_other_on_a_stream(sent: list[Message]) -> None:
    stream = Stream(b"".join(map(encode, sent)))

    received = [read_message(stream.receive_exactly) for _ in sent]

    assert received == sent
    assert stream.data == b""


def test_the_largest_message_comes_out_as_it_went_in() -> None:
    message = Message(
        Kind.PUSH,
        groups=pack_hyperparams([0.9]) * MAX_HYPERPARAMS,
        present=b"\xff" * MAX_PRESENT_BYTES,
        text="x" * MAX_TEXT_BYTES,
        counts=pack_counts([1]) * MAX_COUNTS,
    )
    stream = Stream(encode(message))

    assert read_message(stream.receive_exactly) == message
    assert stream.asked == [HEADER_BYTES, MAX_TRAILER_BYTES]


def test_a_decoded_message_has_the_declared_types() -> None:
    message = Message(Kind.PUSH, groups=pack_hyperparams([1]), present=b"\x01", text="é")
    data = encode(message)

    received = decode(data[:HEADER_BYTES], memoryview(data)[HEADER_BYTES:])

    assert type(received.kind) is Kind
    assert type(received.groups) is bytes
    assert type(received.present) is bytes
    assert received.text == "é"


def test_a_message_without_a_trailer_is_received_in_one_piece() -> None:
    stream = Stream(encode(Message(Kind.BEAT, worker=3)))

    assert read_message(stream.receive_exactly).worker == 3
    assert stream.asked == [HEADER_BYTES]


def test_the_header_announces_the_trailer() -> None:
    data = encode(Message(Kind.PUSH, groups=pack_hyperparams([0.1, 0.2]), present=b"\x01", text="why"))

    assert decode_header(data[:HEADER_BYTES]).trailer_bytes == len(data) - HEADER_BYTES == 2 * 8 + 1 + 3


def test_the_start_and_the_size_of_a_header_stay_the_same_in_every_version() -> None:
    data = encode(Message(Kind.HELLO))

    assert data[:6] == b"LASY" + PROTOCOL_VERSION.to_bytes(2, "little")
    assert len(data) == HEADER_BYTES == 128


def test_the_numbers_of_the_kinds_stay_the_same() -> None:
    names = (
        "HELLO WELCOME REFUSE DRAW TICKETS PULL PARAMETERS PUSH SKIP LEAVE CLOSE ACK BEAT ABORT GOODBYE READ RELEASE"
    )

    assert {kind.name: int(kind) for kind in Kind} == {name: i for i, name in enumerate(names.split(), 1)}


# --------------------------------------------------------------------------------- what cannot be encoded


@pytest.mark.parametrize(
    "fields",
    [
        {"worker": -1},
        {"worker": UINT32 + 1},
        {"worker": 1.5},
        {"worker": None},
        {"incarnation": UINT32 + 1},
        {"optimizer": UINT32 + 1},
        {"version": -1},
        {"version": UINT64 + 1},
        {"ticket": UINT64 + 1},
        {"tickets": UINT32 + 1},
        {"samples": -1},
        {"outcome": UINT16 + 1},
        {"payload_bytes": UINT64 + 1},
        {"waited_s": math.nan},
        {"waited_s": math.inf},
        {"waited_s": -1.0},
        {"waited_s": 10**400},
        {"waited_s": "1"},
        {"dtype": torch.int64},
        {"dtype": "float32"},
        {"kind": 99},
        {"groups": b"x" * 15},
        {"counts": b"x" * 15},
        {"counts": b"x" * 8 * (MAX_COUNTS + 1)},
        {"groups": (0.1, 0.2)},
        {"groups": b"x" * 8 * (MAX_HYPERPARAMS + 1)},
        {"groups": None},
        {"present": b"x" * (MAX_PRESENT_BYTES + 1)},
        {"present": "x"},
        {"text": "x" * (MAX_TEXT_BYTES + 1)},
        {"text": "\ud800"},
        {"text": None},
    ],
    ids=lambda fields: "-".join(f"{name}={value!r:.24}" for name, value in fields.items()),
)
def test_a_value_out_of_range_is_refused_by_the_sender(fields: dict[str, Any]) -> None:
    message = Message(Kind.PUSH)._replace(**fields)

    with pytest.raises(WireError):
        encode(message)


# --------------------------------------------------------------------------------- what cannot be decoded


def receive_garbage(data: bytes) -> Message | None:
    """Whatever arrives: a message, or a WireError; and no request beyond the bounds."""
    stream = Stream(data)
    try:
        return read_message(stream.receive_exactly)
    except WireError:
        return None
    finally:
        assert stream.asked[0] == HEADER_BYTES
        assert all(count <= MAX_TRAILER_BYTES for count in stream.asked)
        assert len(stream.asked) <= 2


@given(data=st.binary(max_size=400))
def test_garbage_is_a_wire_error(data: bytes) -> None:
    assert receive_garbage(data) is None


@given(data=st.binary(min_size=HEADER_BYTES - 6, max_size=400))
def test_garbage_behind_a_good_start_is_a_wire_error_or_a_message(data: bytes) -> None:
    message = receive_garbage(b"LASY" + PROTOCOL_VERSION.to_bytes(2, "little") + data)

    if message is not None:
        encode(message)


@given(
    message=messages,
    counts=st.tuples(st.integers(0, UINT16), st.integers(0, UINT32), st.integers(0, UINT32)),
)
def test_no_announced_size_makes_the_reader_ask_for_more_than_the_bounds(
    message: Message, counts: tuple[int, int, int]
) -> None:
    data = encode(message)
    data = patched(data, "<H", 8, counts[0])
    data = patched(data, "<I", 68, counts[1])
    data = patched(data, "<I", 72, counts[2])

    receive_garbage(data)


def test_the_offsets_of_the_sizes_are_those_that_the_test_above_patches() -> None:
    data = encode(Message(Kind.PUSH))
    for layout, offset, field in (
        ("<H", 8, "hyperparam_count"),
        ("<I", 68, "present_bytes"),
        ("<I", 72, "text_bytes"),
    ):
        assert getattr(decode_header(patched(data, layout, offset, 7)[:HEADER_BYTES]), field) == 7


@pytest.mark.parametrize(
    ("layout", "offset", "bound"),
    [("<H", 8, MAX_HYPERPARAMS), ("<I", 68, MAX_PRESENT_BYTES), ("<I", 72, MAX_TEXT_BYTES), ("<H", 76, MAX_COUNTS)],
)
def test_each_size_has_its_own_bound(layout: str, offset: int, bound: int) -> None:
    data = encode(Message(Kind.PUSH))
    decode_header(patched(data, layout, offset, bound))

    with pytest.raises(WireError, match=f"{bound + 1}"):
        decode_header(patched(data, layout, offset, bound + 1))


@given(message=messages, cut=st.integers(0, 10**6))
def test_a_truncated_message_is_a_wire_error(message: Message, cut: int) -> None:
    data = encode(message)

    assert receive_garbage(data[: cut % len(data)]) is None


@given(message=messages, where=st.integers(0, 10**9))
def test_a_flipped_bit_is_a_wire_error_or_another_message(message: Message, where: int) -> None:
    data = bytearray(encode(message))
    bit = where % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8

    received = receive_garbage(bytes(data))

    reserved = 78 <= bit // 8 < HEADER_BYTES
    # Compared as bytes: a zero with the other sign is another message.
    same = received is not None and encode(received) == encode(message)
    assert same == reserved


@pytest.mark.parametrize("trailer", [b"", b"wh", b"why?"])
def test_a_trailer_has_exactly_the_announced_size(trailer: bytes) -> None:
    data = encode(Message(Kind.ABORT, text="why"))

    with pytest.raises(WireError, match=f"ABORT announced a trailer of 3 bytes, and {len(trailer)} arrived"):
        decode(data[:HEADER_BYTES], trailer)


@pytest.mark.parametrize("size", [0, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_a_header_has_exactly_its_size(size: int) -> None:
    data = encode(Message(Kind.ABORT, text="why"))

    with pytest.raises(WireError, match=f"A header has 128 bytes, and {size} arrived"):
        decode_header(data[:size])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_waiting_time_that_is_no_time_is_refused(value: float) -> None:
    data = encode(Message(Kind.PUSH, waited_s=0.25))
    offset = data.index(struct.pack("<d", 0.25))

    with pytest.raises(WireError, match="waited_s"):
        decode(patched(data, "<d", offset, value), b"")


def test_text_that_is_not_utf8_is_refused() -> None:
    data = encode(Message(Kind.HELLO, text="abc"))

    with pytest.raises(WireError, match="HELLO is not UTF-8"):
        decode(data[:HEADER_BYTES], b"a\xffc")


@pytest.mark.parametrize(("offset", "message"), [(6, "kind of message"), (7, "payload type")])
def test_unknown_codes_are_named(offset: int, message: str) -> None:
    with pytest.raises(WireError, match=f"{message} with the number 200"):
        decode_header(patched(encode(Message(Kind.HELLO)), "<B", offset, 200))


def test_another_programs_bytes_are_refused_by_their_start() -> None:
    with pytest.raises(WireError, match=r"starts with b'LASY', not with b'GET '"):
        decode_header(b"GET / HTTP/1.1\r\n".ljust(HEADER_BYTES, b"\0"))


def test_a_peer_of_another_protocol_version_is_told_both_versions() -> None:
    data = patched(encode(Message(Kind.HELLO)), "<H", 4, PROTOCOL_VERSION + 6)
    data = patched(data, "<B", 6, 200)  # Whatever else differs between the versions does not come first.

    with pytest.raises(ProtocolVersionError, match=rf"version {PROTOCOL_VERSION + 6}\b.*version {PROTOCOL_VERSION}\b"):
        decode_header(data)


def test_errors_of_the_stream_pass_through() -> None:
    def closed(count: int) -> bytes:
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError, match="gone"):
        read_message(closed)
