"""A permit for each batch of a rank's own stream; none is kept, and no batch is lost."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_async.data.ledger import Ledger
from lightning_async.data.ranges import UNBOUNDED
from lightning_async.data.streams import count_samples
from tests.harness import StreamRank

pytestmark = pytest.mark.timeout(60)


@settings(deadline=None)
@given(
    mode=st.sampled_from(["shared", "sharded"]),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    block=st.integers(1, 3),
    permits=st.none() | st.integers(0, 60),
    segment=st.integers(1, 9),
    data=st.data(),
)
def test_every_stream_is_walked_to_its_end_or_until_the_permits_are_gone(
    mode: Any, lengths: list[int], block: int, permits: int | None, segment: int, data: st.DataObject
) -> None:
    ledger = Ledger(len(lengths), mode)
    ranks = [StreamRank(ledger, number, length, block) for number, length in enumerate(lengths)]
    ledger.begin_epoch(range(UNBOUNDED if permits is None else permits), block)

    segments = 0
    while ledger.progress()[1]:
        segments += 1
        assert segments <= sum(lengths) + (permits or 0) + 2 * len(lengths), "the epoch does not end"
        ledger.open(segment * block)
        for rank in ranks:
            rank.open()
        while any(not rank.done for rank in ranks):
            data.draw(st.sampled_from([rank for rank in ranks if not rank.done])).step()

    for rank in ranks:
        assert rank.taken == list(range(len(rank.taken)))
    taken = [len(rank.taken) for rank in ranks]
    if permits is None:
        assert taken == lengths
    elif mode == "shared":
        assert sum(taken) == min(permits, sum(lengths))
    else:
        shares = [sum(ticket // block % len(ranks) == rank.number for ticket in range(permits)) for rank in ranks]
        assert taken == [min(share, length) for share, length in zip(shares, lengths, strict=True)]
    assert ledger.progress()[0] == sum(taken)
    assert all(ledger.leased(rank.number) == 0 for rank in ranks)


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    name: str
    x: Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 2), 5),
        (torch.zeros(()), 1),
        ({"name": "abc", "x": [torch.zeros(3)]}, 3),
        (Pair(torch.zeros(()), torch.zeros(4, 1)), 4),
        (Sample("abc", torch.zeros(2)), 2),
        (["text", "more text"], 1),
        ([], 1),
        (None, 1),
    ],
    ids=str,
)
def test_samples_are_counted_in_the_first_tensor_that_has_a_length(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples
