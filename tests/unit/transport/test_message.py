"""The control connection's message format: what goes in comes out, and garbage is only ever a WireError."""

from __future__ import annotations

import math
import struct
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.transport.codec import (
    HEADER_BYTES,
    MAX_TRAILER_BYTES,
    PROTOCOL_VERSION,
    ProtocolVersionError,
    decode,
    decode_header,
    encode,
    read_message,
)
from lightning_async.transport.fields import (
    MAX_COUNTS,
    MAX_HYPERPARAMS,
    MAX_PRESENT_BYTES,
    MAX_RANGES,
    MAX_TEXT_BYTES,
    WireError,
    pack_counts,
    pack_hyperparams,
)
from lightning_async.transport.layouts import layout_of_type
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

UINT32, UINT64 = 2**32 - 1, 2**64 - 1
finite = st.floats(allow_nan=False, allow_infinity=False)
workers, texts, flags = st.integers(0, UINT32), st.text(max_size=40), st.booleans()
packed_counts = st.lists(st.integers(0, UINT64), max_size=12).map(pack_counts)
dtypes = st.sampled_from([None, torch.float32, torch.float64, torch.float16, torch.bfloat16])
ranges = st.builds(lambda start, count: range(start, start + count), st.integers(0, 2**61), st.integers(1, 2**61))
tickets = st.lists(ranges, max_size=5).map(tuple)
handed_out = st.builds(lambda start, count: range(start, start + count), st.integers(0, UINT64), st.integers(0, UINT32))
messages_of: dict[type, st.SearchStrategy[Message]] = {
    Hello: st.builds(Hello, workers, st.integers(0, UINT32), texts),
    Challenge: st.builds(Challenge, workers, texts),
    Proof: st.builds(Proof, workers, texts),
    Welcome: st.builds(Welcome, workers, texts),
    Refuse: st.builds(Refuse, workers, texts),
    Draw: st.builds(Draw, workers),
    Tickets: st.builds(Tickets, workers, handed_out),
    Pull: st.builds(Pull, workers, packed_counts),
    Parameters: st.builds(
        Parameters,
        workers,
        version=st.integers(0, UINT64),
        outcome=st.sampled_from(Outcome),
        tickets=handed_out,
        dtype=dtypes,
        payload_bytes=st.integers(0, UINT64),
        counts=packed_counts,
    ),
    Push: st.builds(
        Push,
        workers,
        optimizer=st.integers(0, UINT32),
        version=st.integers(0, UINT64),
        tickets=tickets,
        samples=st.integers(0, UINT64),
        waited_s=st.floats(0, allow_infinity=False),
        wants_tickets=flags,
        dtype=dtypes,
        payload_bytes=st.integers(0, UINT64),
        hyperparams=st.lists(finite, max_size=12).map(pack_hyperparams),
        present=st.binary(max_size=40),
        counts=packed_counts,
        finite=flags,
    ),
    Skip: st.builds(Skip, workers, tickets, packed_counts),
    Release: st.builds(Release, workers, tickets, flags),
    Leave: st.builds(Leave, workers),
    Close: st.builds(Close, workers),
    Read: st.builds(Read, workers, packed_counts),
    Ack: st.builds(Ack, workers, flags),
    Beat: st.builds(Beat, workers, texts),
    Abort: st.builds(Abort, workers, texts),
    Evict: st.builds(Evict, workers, texts),
    Part: st.builds(Part, workers, st.integers(0, UINT64), dtypes, st.integers(0, UINT64)),
    Goodbye: st.builds(Goodbye, workers),
}
messages = st.one_of(*messages_of.values())
every_kind = pytest.mark.parametrize("kind", get_args(Message), ids=lambda kind: kind.__name__)


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


@every_kind
@given(data=st.data())
def test_every_message_comes_out_as_it_went_in(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages_of[kind])
    sent = encode(message)

    for received in (
        decode(sent[:HEADER_BYTES], sent[HEADER_BYTES:]),
        decode(memoryview(sent)[:HEADER_BYTES], bytearray(sent[HEADER_BYTES:])),
    ):
        assert type(received) is kind
        assert received == message


@given(sent=st.lists(messages, max_size=4))
def test_messages_follow_each_other_on_a_stream(sent: list[Message]) -> None:
    stream = Stream(b"".join(map(encode, sent)))

    received = [read_message(stream.receive_exactly) for _ in sent]

    assert received == sent
    assert list(map(type, received)) == list(map(type, sent))
    assert stream.data == b""


def test_the_largest_message_comes_out_as_it_went_in() -> None:
    message = Push(
        worker=1,
        tickets=tuple(range(3 * start, 3 * start + 2) for start in range(MAX_RANGES)),
        hyperparams=pack_hyperparams([0.9]) * MAX_HYPERPARAMS,
        present=b"\xff" * MAX_PRESENT_BYTES,
        counts=pack_counts([1]) * MAX_COUNTS,
    )
    stream = Stream(encode(message))

    assert read_message(stream.receive_exactly) == message
    assert stream.asked == [HEADER_BYTES, MAX_TRAILER_BYTES - MAX_TEXT_BYTES]


def test_a_decoded_message_has_the_declared_types() -> None:
    sent = Push(worker=1, tickets=(range(3),), wants_tickets=True, hyperparams=pack_hyperparams([1]), present=b"\x01")
    data, answer = encode(sent), encode(Parameters(worker=1, outcome=Outcome.DROPPED))

    received = decode(data[:HEADER_BYTES], memoryview(data)[HEADER_BYTES:])
    answered = decode(answer, b"")

    assert isinstance(received, Push)
    assert isinstance(answered, Parameters)
    assert type(received.hyperparams) is bytes
    assert type(received.present) is bytes
    assert received.wants_tickets is True
    assert answered.outcome is Outcome.DROPPED


def test_a_message_without_a_trailer_is_received_in_one_piece() -> None:
    stream = Stream(encode(Beat(worker=3)))

    assert read_message(stream.receive_exactly).worker == 3
    assert stream.asked == [HEADER_BYTES]


def test_the_header_announces_the_trailer() -> None:
    data = encode(Push(1, tickets=(range(2),), hyperparams=pack_hyperparams([0.1, 0.2]), present=b"\x01"))

    assert decode_header(data[:HEADER_BYTES]).trailer_bytes == len(data) - HEADER_BYTES == 16 + 2 * 8 + 1


def test_the_start_and_the_size_of_a_header_stay_the_same_in_every_version() -> None:
    data = encode(Hello(1))

    assert data[:6] == b"LASY" + PROTOCOL_VERSION.to_bytes(2, "little")
    assert len(data) == HEADER_BYTES == 128


def test_the_numbers_of_the_kinds_stay_the_same() -> None:
    names = (
        "HELLO WELCOME REFUSE DRAW TICKETS PULL PARAMETERS PUSH SKIP LEAVE CLOSE ACK BEAT ABORT GOODBYE READ RELEASE "
        "CHALLENGE PROOF EVICT PART"
    )

    assert {kind.name: int(kind) for kind in Kind} == {name: i for i, name in enumerate(names.split(), 1)}
    assert {kind_of(kind) for kind in get_args(Message)} == set(Kind)
    assert {layout.kind for layout in layout_of_type.values()} == set(Kind)


# --------------------------------------------------------------------------------- what cannot be encoded


PUSH, PARAMETERS, SKIP = Push(1), Parameters(1), Skip(1)


def changed(message: Any) -> list[str]:
    fields = getattr(message, "_fields", ())
    return ["", *(name for name in fields if getattr(message, name) != getattr(type(message)(1), name))]


@pytest.mark.parametrize(
    "message",
    [
        PUSH._replace(worker=-1),
        PUSH._replace(worker=UINT32 + 1),
        PUSH._replace(worker=1.5),
        PUSH._replace(worker=None),
        PUSH._replace(optimizer=UINT32 + 1),
        PUSH._replace(version=-1),
        PUSH._replace(version=UINT64 + 1),
        PUSH._replace(samples=-1),
        PUSH._replace(payload_bytes=UINT64 + 1),
        PUSH._replace(waited_s=math.nan),
        PUSH._replace(waited_s=math.inf),
        PUSH._replace(waited_s=-1.0),
        PUSH._replace(waited_s=10**400),
        PUSH._replace(waited_s="1"),
        PUSH._replace(dtype=torch.int64),
        PUSH._replace(dtype="float32"),
        PUSH._replace(hyperparams=b"x" * 15),
        PUSH._replace(hyperparams=(0.1, 0.2)),
        PUSH._replace(hyperparams=b"x" * 8 * (MAX_HYPERPARAMS + 1)),
        PUSH._replace(hyperparams=None),
        PUSH._replace(counts=b"x" * 15),
        PUSH._replace(counts=b"x" * 8 * (MAX_COUNTS + 1)),
        PUSH._replace(present=b"x" * (MAX_PRESENT_BYTES + 1)),
        PUSH._replace(present="x"),
        PUSH._replace(tickets=3),
        PUSH._replace(tickets=((0, 3),)),
        PUSH._replace(tickets=(range(0),)),
        PUSH._replace(tickets=(range(-1, 2),)),
        PUSH._replace(tickets=(range(0, 4, 2),)),
        PUSH._replace(tickets=(range(2**63),)),
        SKIP._replace(tickets=(range(1),) * (MAX_RANGES + 1)),
        PARAMETERS._replace(tickets=range(UINT64 + 1, UINT64 + 2)),
        PARAMETERS._replace(tickets=range(UINT32 + 1)),
        PARAMETERS._replace(tickets=range(0, 4, 2)),
        PARAMETERS._replace(outcome=4),
        PARAMETERS._replace(dtype=torch.int64),
        Hello(1, incarnation=UINT32 + 1),
        Abort(1, "x" * (MAX_TEXT_BYTES + 1)),
        Abort(1, "\ud800"),
        Abort(1, None),  # type: ignore[arg-type]
        (1, 2, 3),
    ],
    ids=lambda message: type(message).__name__ + "-".join(changed(message)),
)
def test_a_value_out_of_range_is_refused_by_the_sender(message: Any) -> None:
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


# Where the sizes of the sections stand, and their bounds.
SIZES = {
    "hyperparams": ("<H", 12, MAX_HYPERPARAMS),
    "counts": ("<H", 14, MAX_COUNTS),
    "tickets": ("<I", 16, MAX_RANGES),
    "present": ("<I", 20, MAX_PRESENT_BYTES),
    "text": ("<I", 24, MAX_TEXT_BYTES),
}


@given(message=messages, sizes=st.fixed_dictionaries({name: st.integers(0, 2**16 - 1) for name in SIZES}))
def test_no_announced_size_makes_the_reader_ask_for_more_than_the_bounds(
    message: Message, sizes: dict[str, int]
) -> None:
    data = encode(message)
    for name, (layout, offset, _) in SIZES.items():
        data = patched(data, layout, offset, sizes[name])

    receive_garbage(data)


@pytest.mark.parametrize("section", SIZES)
def test_each_size_has_its_own_bound(section: str) -> None:
    layout, offset, bound = SIZES[section]
    data = encode(Abort(1)) if section == "text" else encode(Push(1))
    unit = {"hyperparams": 8, "counts": 8, "tickets": 16}.get(section, 1)
    assert decode_header(patched(data, layout, offset, bound)).trailer_bytes == unit * bound

    with pytest.raises(WireError, match=f"{bound + 1}"):
        decode_header(patched(data, layout, offset, bound + 1))


SECTIONS: dict[type, set[str]] = {
    **{kind: {"text"} for kind in (Hello, Challenge, Proof, Welcome, Refuse, Beat, Abort, Evict)},
    **{kind: {"counts"} for kind in (Pull, Read, Parameters)},
    Push: {"tickets", "hyperparams", "present", "counts"},
    Skip: {"tickets", "counts"},
    Release: {"tickets"},
}


@every_kind
def test_a_section_that_a_kind_does_not_have_is_refused(kind: Any) -> None:
    data = encode(kind(1))

    for name in SIZES.keys() - SECTIONS.get(kind, set()):
        layout, offset, _ = SIZES[name]
        with pytest.raises(WireError, match="where it must have zeros"):
            decode_header(patched(data, layout, offset, 1))


@every_kind
@given(data=st.data(), cut=st.integers(0, 10**6))
def test_a_truncated_message_is_a_wire_error(kind: type, data: st.DataObject, cut: int) -> None:
    sent = encode(data.draw(messages_of[kind]))

    assert receive_garbage(sent[: cut % len(sent)]) is None


@every_kind
@given(data=st.data(), where=st.integers(0, 10**9))
def test_a_flipped_bit_is_a_wire_error_or_another_message(kind: type, data: st.DataObject, where: int) -> None:
    message = data.draw(messages_of[kind])
    sent = bytearray(encode(message))
    bit = where % (8 * len(sent))
    sent[bit // 8] ^= 1 << bit % 8

    received = receive_garbage(bytes(sent))

    # Compared as bytes: a zero with the other sign is another message.
    assert received is None or encode(received) != encode(message)


@pytest.mark.parametrize("trailer", [b"", b"wh", b"why?"])
def test_a_trailer_has_exactly_the_announced_size(trailer: bytes) -> None:
    data = encode(Abort(1, "why"))

    with pytest.raises(WireError, match=f"ABORT announced a trailer of 3 bytes, and {len(trailer)} arrived"):
        decode(data[:HEADER_BYTES], trailer)


@pytest.mark.parametrize("size", [0, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_a_header_has_exactly_its_size(size: int) -> None:
    data = encode(Abort(1, "why"))

    with pytest.raises(WireError, match=f"A header has 128 bytes, and {size} arrived"):
        decode_header(data[:size])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_waiting_time_that_is_no_time_is_refused(value: float) -> None:
    data = encode(Push(1, waited_s=0.25))
    offset = data.index(struct.pack("<d", 0.25))

    with pytest.raises(WireError, match="waited_s"):
        decode(patched(data, "<d", offset, value), b"")


def test_text_that_is_not_utf8_is_refused() -> None:
    data = encode(Hello(1, claims="abc"))

    with pytest.raises(WireError, match="HELLO is not UTF-8"):
        decode(data[:HEADER_BYTES], b"a\xffc")


@pytest.mark.parametrize(
    ("message", "offset", "reason"),
    [
        (Hello(1), 6, "kind of message"),
        (Push(1), 65, "payload type"),
        (Parameters(1), 57, "payload type"),
        (Parameters(1), 56, "outcome of a push"),
    ],
    ids=["kind", "dtype of a push", "dtype of parameters", "outcome"],
)
def test_unknown_codes_are_named(message: Message, offset: int, reason: str) -> None:
    with pytest.raises(WireError, match=f"{reason} with the number 200"):
        decode(patched(encode(message), "<B", offset, 200), b"")


@pytest.mark.parametrize("bounds", [(3, 3), (4, 3), (0, 2**62 + 1), (2**63, 2**63 + 1)])
def test_a_range_of_tickets_that_is_none_is_refused(bounds: tuple[int, int]) -> None:
    data = encode(Skip(1, tickets=(range(1),)))

    with pytest.raises(WireError, match="Tickets must be a range"):
        decode(data[:HEADER_BYTES], struct.pack("<QQ", *bounds))


def test_another_programs_bytes_are_refused_by_their_start() -> None:
    with pytest.raises(WireError, match=r"starts with b'LASY', not with b'GET '"):
        decode_header(b"GET / HTTP/1.1\r\n".ljust(HEADER_BYTES, b"\0"))


def test_a_peer_of_another_protocol_version_is_told_both_versions() -> None:
    data = patched(encode(Hello(1)), "<H", 4, PROTOCOL_VERSION + 6)
    data = patched(data, "<B", 6, 200)  # Whatever else differs between the versions does not come first.

    with pytest.raises(ProtocolVersionError, match=rf"version {PROTOCOL_VERSION + 6}\b.*version {PROTOCOL_VERSION}\b"):
        decode_header(data)


def test_errors_of_the_stream_pass_through() -> None:
    def closed(count: int) -> bytes:
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError, match="gone"):
        read_message(closed)
