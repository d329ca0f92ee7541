"""A worker's tickets: each is reported or given back once, whatever the loader does with its batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.data.ledger import Ledger
from lightning_async.exchange.drawn_tickets import DrawnTickets


def each(ranges: tuple[range, ...]) -> list[int]:
    return [ticket for of_range in ranges for ticket in of_range]


@given(
    block=st.integers(1, 4),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "hand_on", "hand_on", "begin", "leave_out", "report", "give_back"]),
            st.integers(0, 5),
        ),
        max_size=60,
    ),
)
def test_the_ledger_takes_every_ticket_back_once_as_it_is_named(block: int, actions: list[tuple[str, int]]) -> None:
    ledger, tickets = Ledger(1), DrawnTickets()
    ledger.begin_epoch(range(40), block)
    ledger.open(40)
    handed: list[int] = []
    begun: list[int] = []

    for action, count in actions:
        some = min(count, len(handed))
        if action == "add":
            tickets.add(ledger.draw(0))
        elif action == "hand_on":
            handed += tickets.hand_on() or []
        elif action == "begin" and handed:
            tickets.begin_batch()
            begun.append(handed.pop(0))
        elif action == "leave_out":
            tickets.leave_out(some)
            begun, handed = begun + handed[:some], handed[some:]
        elif action == "report":
            assert list(ledger.complete(0, tickets.report())) == begun
            begun = []
        elif action == "give_back":
            returned = tickets.give_back(some)
            assert sorted(each(returned)) == sorted(handed[len(handed) - some :])
            ledger.release(0, returned, stream_over=False)
            handed = handed[: len(handed) - some]
        assert tickets.has_unreported == bool(begun)

    ledger.complete(0, tickets.report())
    ledger.release(0, tickets.give_back(len(handed)), stream_over=False)
    ledger.release(0, tickets.give_back_waiting(), stream_over=False)
    assert ledger.leased(0) == 0
    applied, left = ledger.progress()
    assert applied + left == 40


def test_batches_that_do_not_follow_each_other_are_named_in_their_order() -> None:
    tickets = DrawnTickets()
    for drawn in (range(4, 6), range(6, 7), range(2, 3)):
        tickets.add(drawn)
        tickets.hand_on()
    tickets.leave_out(4)

    assert tickets.report() == (range(4, 7), range(2, 3))
    assert tickets.report() == ()


def test_an_empty_answer_ends_the_segment_once() -> None:
    tickets = DrawnTickets()
    tickets.add_answer(range(3, 4))
    tickets.add_answer(range(0))

    assert [tickets.hand_on() for _ in range(3)] == [range(3, 4), range(0), None]


def test_a_batch_that_no_ticket_was_drawn_for_is_refused() -> None:
    tickets = DrawnTickets()

    with pytest.raises(RuntimeError, match="no ticket was drawn for"):
        tickets.begin_batch()
    with pytest.raises(ValueError, match="1 tickets cannot be given back: the loader has 0"):
        tickets.give_back(1)


def test_an_epoch_that_ends_early_leaves_nothing_for_the_next() -> None:
    tickets = DrawnTickets()
    for drawn in (range(2), range(2, 4)):
        tickets.add(drawn)
    tickets.hand_on()
    tickets.begin_batch()
    tickets.add_answer(range(0))

    tickets.begin_epoch()

    assert (tickets.waiting, tickets.report(), tickets.hand_on()) == (0, (), None)
    with pytest.raises(RuntimeError):
        tickets.begin_batch()
