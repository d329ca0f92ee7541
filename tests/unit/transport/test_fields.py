"""The fields of a message that vary in size: what is packed comes out, and nothing else is taken."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.transport.codec import encode
from lightning_async.transport.fields import (
    MAX_PRESENT_BYTES,
    MAX_TEXT_BYTES,
    WireError,
    fit_text,
    pack_bitmap,
    pack_hyperparams,
    unpack_bitmap,
    unpack_hyperparams,
)
from lightning_async.transport.message import Abort


@given(text=st.text())
def test_fit_text_keeps_what_can_be_sent(text: str) -> None:
    assert fit_text(text) == text


@pytest.mark.parametrize("text", ["x" * 10**6, "é" * 10**6, "x" + "é" * 10**6, "broken \udcff"])
def test_fit_text_makes_any_text_one_that_can_be_sent(text: str) -> None:
    fitted = fit_text(text)

    encode(Abort(worker=1, reason=fitted))
    assert len(fitted.encode()) >= min(len(text), MAX_TEXT_BYTES - 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(3))
def test_hyper_parameters_that_are_not_finite_are_refused(position: int, value: float) -> None:
    values = [1e-4, 0.9, 0.999]
    values[position] = value

    with pytest.raises(WireError, match="must be finite"):
        unpack_hyperparams(struct.pack("<3d", *values), 3)
    with pytest.raises(WireError, match="must be finite"):
        pack_hyperparams(values)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_hyper_parameters_are_taken_as_there_are(count: int) -> None:
    with pytest.raises(WireError, match=f"sends 2 hyperparameters, the holder has {count}"):
        unpack_hyperparams(pack_hyperparams([0.1, 0.2]), count)


@given(flags=st.lists(st.booleans(), max_size=200))
def test_a_bitmap_holds_its_flags_in_order(flags: list[bool]) -> None:
    data = pack_bitmap(flags)

    assert unpack_bitmap(data, len(flags)) == flags
    assert len(data) == math.ceil(len(flags) / 8)
    assert flags == [bool(data[i // 8] >> i % 8 & 1) for i in range(len(flags))]


@given(data=st.binary(max_size=30), count=st.integers(0, 250))
def test_a_bitmap_is_unpacked_only_if_packing_gives_it_back(data: bytes, count: int) -> None:
    try:
        flags = unpack_bitmap(data, count)
    except WireError:
        canonical = len(data) == math.ceil(count / 8) and all(
            i < count or not data[i // 8] >> i % 8 & 1 for i in range(8 * len(data))
        )
        assert not canonical
    else:
        assert len(flags) == count
        assert pack_bitmap(flags) == data


def test_a_bitmap_of_the_wrong_length_or_with_stray_bits_is_refused() -> None:
    with pytest.raises(WireError, match="9 flags has 2 bytes, and 1 arrived"):
        unpack_bitmap(b"\x01", 9)
    with pytest.raises(WireError, match="past the last"):
        unpack_bitmap(b"\x08", 3)
    with pytest.raises(WireError, match="0 bytes"):
        unpack_bitmap(b"\x00", 0)
    assert unpack_bitmap(b"", 0) == []


def test_a_bitmap_of_the_largest_size_is_quick() -> None:
    flags = [True, False, True, True] * (2 * MAX_PRESENT_BYTES)

    assert unpack_bitmap(pack_bitmap(flags), len(flags)) == flags
