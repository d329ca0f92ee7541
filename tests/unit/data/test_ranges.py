"""Ranges hold the same tickets as sets and lists would, in a few numbers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.data.ranges import UNBOUNDED, RangeSet, TicketQueue

pytestmark = pytest.mark.timeout(60)

ranges = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair)))


@given(added=st.lists(ranges, max_size=20), stop=st.integers(0, 60))
def test_a_range_set_holds_what_was_added(added: list[tuple[int, int]], stop: int) -> None:
    expected = {number for start, end in added for number in range(start, end)}

    found = RangeSet(added)

    assert list(found) == sorted(expected)
    assert len(found) == len(expected)
    assert all((number in found) is (number in expected) for number in range(60))
    missing = [number for start, end in found.missing(stop) for number in range(start, end)]
    assert missing == [number for number in range(stop) if number not in expected]
    # Neighbours are one range: a checkpoint of an epoch in order is a few numbers.
    pairs = found.pairs()
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(pairs))


@given(
    left=st.lists(ranges, max_size=6),
    block=st.integers(1, 4),
    shares=st.integers(1, 4),
    limits=st.lists(st.integers(0, 5), max_size=30),
    data=st.data(),
)
def test_the_shares_of_a_queue_deal_out_everything_once_and_in_whole_blocks(
    left: list[tuple[int, int]], block: int, shares: int, limits: list[int], data: st.DataObject
) -> None:
    pairs = RangeSet(left).pairs()
    expected = set(RangeSet(left))
    queues = [TicketQueue(pairs, block, share, shares) for share in range(shares)]
    out: set[int] = set()

    for limit in [*limits, *([10**6] * (2 * len(expected) + 1) * shares)]:
        share = (
            data.draw(st.integers(0, shares - 1))
            if limit < 10**6
            else limit and min(range(shares), key=lambda index: -queues[index].count)
        )
        taken = queues[share].take(limit)
        assert len(taken) <= limit
        assert len({ticket // block for ticket in taken}) <= 1
        assert {ticket // block % shares for ticket in taken} <= {share}
        assert out.isdisjoint(taken)
        out |= set(taken)
        if limit < 10**6 and taken and data.draw(st.booleans()):
            queues[share].put_back(taken[-1])
            out.discard(taken[-1])
        bound = data.draw(st.integers(0, 60)) if limit < 10**6 else UNBOUNDED
        assert sum(queue.count_below(bound) for queue in queues) == sum(ticket < bound for ticket in expected - out)

    assert out == expected


def test_an_epoch_without_end_costs_nothing() -> None:
    queue = TicketQueue([(0, UNBOUNDED)], block=4, share=1, shares=3)

    assert [queue.take(9), queue.take(2), queue.take(9)] == [range(4, 8), range(16, 18), range(18, 20)]
    assert queue.count == queue.count_below(UNBOUNDED) > UNBOUNDED // 4
