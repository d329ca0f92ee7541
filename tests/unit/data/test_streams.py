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
from lightning_async.data.streams import OwnStream, count_samples
from lightning_async.exchange.drawn_tickets import DrawnTickets

pytestmark = pytest.mark.timeout(60)


class Rank:
    """A rank's loop over its own stream of ``length`` batches, as `worker.py` and `internals/` run it."""

    def __init__(self, ledger: Ledger, number: int, length: int, block: int) -> None:
        self.ledger, self.number, self.block = ledger, number, block
        self.source = iter(range(length))
        self.stream = OwnStream(lambda: next(self.source))
        self.taken: list[int] = []
        self.tickets = DrawnTickets()
        self.unreported = 0
        self.done = True

    def open(self) -> None:
        self.stream.open(self.draw, self.release)
        self.done = False

    def draw(self) -> range:
        handed = self.tickets.hand_on()
        if handed is None:
            self.tickets.add(self.ledger.draw(self.number))
            handed = self.tickets.hand_on()
        return handed or range(0)

    def release(self, tickets: int, over: bool) -> None:
        self.ledger.release(self.number, self.tickets.give_back(tickets), over)

    def step(self) -> bool:
        """One batch; at the end of the segment, what is left of an update."""
        if self.done:
            return False
        if self.stream.has_next():
            self.taken.append(self.stream.take())
            self.tickets.begin_batch()
            self.unreported += 1
            if self.unreported == self.block:
                self.push()
            return True
        if self.unreported:
            self.push()
        self.ledger.release(self.number, self.tickets.give_back_waiting(), False)
        self.tickets.finish_segment()
        self.done = True
        return False

    def push(self) -> None:
        self.ledger.complete(self.number, self.tickets.report())
        self.unreported = 0
        # The next permits come with the answer, unless there are some.
        if not self.tickets.waiting:
            self.tickets.add_answer(self.ledger.draw(self.number))


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
    ranks = [Rank(ledger, number, length, block) for number, length in enumerate(lengths)]
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
