"""Every batch of an epoch is handed out once, whatever the order in which ranks ask, finish and fall silent."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async.data.ledger import Ledger
from lightning_async.data.ranges import UNBOUNDED

pytestmark = pytest.mark.timeout(60)

Mode = Literal["shared", "sharded"]
modes = st.sampled_from(["shared", "sharded"])


@dataclass(frozen=True)
class Op:
    """One call at the ledger."""

    name: str
    worker: int
    count: int


def operations(workers: int) -> st.SearchStrategy[list[Op]]:
    names = ["draw"] * 6 + ["complete"] * 3
    names += ["release", "foreign", "open", "close", "requeue", "evict", "evict", "admit", "admit"]
    return st.lists(
        st.builds(Op, st.sampled_from(names), st.integers(0, workers - 1), st.integers(0, 6)), min_size=10, max_size=60
    )


def ranges(tickets: list[int]) -> list[range]:
    """As a worker names them: one range after the other, neighbours in one."""
    named: list[range] = []
    for ticket in tickets:
        if named and named[-1].stop == ticket:
            named[-1] = range(named[-1].start, ticket + 1)
        else:
            named.append(range(ticket, ticket + 1))
    return named


class Model:
    """What the ledger must have done so far."""

    def __init__(self, tickets: range) -> None:
        self.free = set(tickets)
        self.leased: dict[int, list[int]] = {}
        self.gone: set[int] = set()
        self.applied: list[int] = list(range(tickets.start))

    def draw(self, ledger: Ledger, worker: int) -> range:
        drawn = ledger.draw(worker)
        assert self.free.issuperset(drawn), "handed out a ticket that is out, applied or foreign"
        self.free.difference_update(drawn)
        self.leased.setdefault(worker, []).extend(drawn)
        return drawn

    def complete(self, ledger: Ledger, worker: int, tickets: list[int]) -> None:
        ledger.check(worker, ranges(tickets))
        assert list(ledger.complete(worker, ranges(tickets))) == tickets
        self.take(worker, tickets)
        self.applied += tickets

    def release(self, ledger: Ledger, worker: int, tickets: list[int]) -> None:
        ledger.release(worker, ranges(tickets), stream_over=False)
        self.take(worker, tickets)
        self.free.update(tickets)

    def take(self, worker: int, tickets: list[int]) -> None:
        self.leased[worker] = [ticket for ticket in self.leased.get(worker, []) if ticket not in tickets]

    def refuse(self, ledger: Ledger, worker: int, tickets: list[int]) -> None:
        """Neither reports nor gives back a ticket that it does not hold, or one twice."""
        before = ledger.progress(), ledger.leased(worker)
        for act in (ledger.complete, ledger.check, functools.partial(ledger.release, stream_over=False)):
            with pytest.raises(ValueError, match=rf"worker {worker} (reports|gives back) .*batch"):
                act(worker, ranges(tickets))
        assert (ledger.progress(), ledger.leased(worker)) == before

    def evict(self, ledger: Ledger, worker: int) -> None:
        mine = self.leased.get(worker, [])
        self.leased[worker] = []
        self.gone.add(worker)
        assert ledger.evict(worker) == len(mine)
        assert ledger.evict(worker) == 0
        self.free.update(mine)

    def admit(self, ledger: Ledger, worker: int) -> None:
        self.gone.discard(worker)
        self.leased.setdefault(worker, [])
        ledger.admit(worker)

    def present(self, workers: int) -> list[int]:
        """Those in the run: of the workers that it began with, and of those that have come in addition."""
        return sorted(({*range(workers)} | self.leased.keys()) - self.gone)

    def requeue(self, ledger: Ledger, worker: int) -> None:
        mine = self.leased.get(worker, [])
        self.leased[worker] = []
        assert ledger.requeue(worker) == len(mine)
        self.free.update(mine)


@settings(deadline=None)
@given(
    mode=modes,
    workers=st.integers(1, 4),
    total=st.integers(0, 30),
    start=st.integers(0, 10),
    block=st.integers(1, 4),
    data=st.data(),
)
def test_every_ticket_is_applied_once_under_any_interleaving(
    mode: Mode, workers: int, total: int, start: int, block: int, data: st.DataObject
) -> None:
    ledger = Ledger(workers, mode)
    # An epoch that is resumed begins in the middle.
    tickets = range(start, start + total)
    ledger.begin_epoch(tickets, block)
    ledger.open(data.draw(st.integers(0, total)))
    model = Model(tickets)

    for op in data.draw(operations(workers)):
        present = model.present(workers)
        if op.name == "evict":
            # Rank 0 has the ledger.
            if op.worker:
                model.evict(ledger, op.worker)
        elif op.name == "admit":
            model.admit(ledger, op.count)
        elif op.worker not in present:
            continue
        elif op.name == "draw":
            drawn = model.draw(ledger, op.worker)
            assert len(drawn) <= block
            if mode == "sharded":
                owners = {worker: [one for one in present if one % workers == worker] for worker in range(workers)}
                share = {ticket // block % workers for ticket in drawn}
                # Its own, or one that nobody in the run has.
                assert all(op.worker in owners[one] or not owners[one] for one in share)
        elif op.name in ("complete", "release"):
            # Any of those that it holds, in any order.
            held = data.draw(st.permutations(sorted(model.leased.get(op.worker, []))))[: op.count]
            (model.complete if op.name == "complete" else model.release)(ledger, op.worker, held)
        elif op.name == "foreign":
            mine = model.leased.get(op.worker, [])
            others = sorted({*range(tickets.stop + 2)} - {*mine})
            foreign = data.draw(st.sampled_from([*others, *mine]))
            twice = [foreign] if foreign in mine else []
            model.refuse(ledger, op.worker, [*mine[: op.count], foreign, *twice])
        elif op.name == "requeue":
            model.requeue(ledger, op.worker)
        elif op.name == "open":
            ledger.open(op.count)
        else:
            ledger.close()
            assert [list(model.draw(ledger, worker)) for worker in present] == [[]] * len(present)
        assert ledger.progress() == (len(model.applied), len(model.free))
        assert all(ledger.leased(worker) == len(leased) for worker, leased in model.leased.items())

    # The rest of the epoch: every rank finishes what it has, and all together compute what is left.
    ledger.open(total)
    present = model.present(workers)
    while sum(len(model.draw(ledger, worker)) for worker in present):
        continue
    for worker, leased in model.leased.items():
        model.complete(ledger, worker, leased)
    assert sorted(model.applied) == list(range(tickets.stop))
    assert ledger.progress() == (tickets.stop, 0)


@settings(deadline=None, max_examples=40)
@given(total=st.integers(0, 30), block=st.integers(1, 3), runs=st.integers(1, 4), data=st.data())
def test_every_ticket_is_applied_once_relative_to_the_checkpoint_that_a_run_goes_on_from(
    total: int, block: int, runs: int, data: st.DataObject
) -> None:
    saved: list[tuple[int, int]] = []

    for run in range(runs):
        # Each run has its own number of ranks; what was handed out and not applied when the last one ended is lost.
        workers, mode = data.draw(st.integers(1, 4)), data.draw(modes)
        before = [ticket for start, stop in saved for ticket in range(start, stop)]
        ledger = Ledger(workers, mode)
        ledger.begin_epoch(range(total), block, saved)
        assert ledger.applied() == saved
        model = Model(range(total))
        model.free.difference_update(before)
        model.applied = list(before)
        ledger.open(data.draw(st.integers(0, total)))
        last = run == runs - 1
        for op in data.draw(operations(workers)):
            if op.name == "draw":
                model.draw(ledger, op.worker)
            elif op.name == "complete":
                model.complete(ledger, op.worker, model.leased.get(op.worker, [])[: op.count])
            elif op.name == "open":
                ledger.open(op.count)
            if data.draw(st.booleans()):
                saved = ledger.applied()
                assert [ticket for pair in saved for ticket in range(*pair)] == sorted(model.applied)
        if last:
            ledger.open(total)
            while sum(len(model.draw(ledger, worker)) for worker in range(workers)):
                continue
            for worker, leased in model.leased.items():
                model.complete(ledger, worker, leased)
            assert sorted(model.applied) == list(range(total))


def test_what_a_worker_gives_back_is_for_others_and_its_kept_first_batch_too() -> None:
    ledger = Ledger(2, "shared")
    ledger.begin_epoch(range(4), block=2)
    ledger.open(4)
    assert [list(ledger.draw(worker)) for worker in (0, 0)] == [[0, 1], []]

    ledger.release(0, [range(1, 2)], stream_over=True)
    ledger.release(1, [], stream_over=False)

    assert list(ledger.draw(0)) == []
    assert [list(ledger.draw(1)) for _ in range(3)] == [[1], [2, 3], []]
    with pytest.raises(ValueError, match="gives back 4 batches but holds 3"):
        ledger.release(1, [range(4)], stream_over=True)


def test_an_epoch_is_over_when_every_stream_is() -> None:
    ledger = Ledger(2, "shared")
    ledger.begin_epoch(range(UNBOUNDED))
    ledger.open(UNBOUNDED)
    ledger.complete(0, [ledger.draw(0)])

    ledger.release(0, [], stream_over=True)
    assert ledger.progress()[1] > 0
    ledger.release(1, [ledger.draw(1)], stream_over=True)

    assert ledger.progress() == (1, 0)


@given(mode=modes, workers=st.integers(1, 4), total=st.integers(0, 40), segments=st.lists(st.integers(0, 15)))
def test_a_segment_hands_out_exactly_the_next_tickets_in_the_global_order(
    mode: Mode, workers: int, total: int, segments: list[int]
) -> None:
    ledger = Ledger(workers, mode)
    ledger.begin_epoch(range(total))
    done = 0

    for tickets in [*segments, total]:
        ledger.open(tickets)
        drawn: list[int] = []
        while batch := [ticket for worker in range(workers) for ticket in ledger.draw(worker)]:
            drawn += batch

        expected = range(done, min(done + tickets, total))
        assert sorted(drawn) == list(expected)
        done = expected.stop


@given(workers=st.integers(2, 5), block=st.integers(1, 3), extra=st.integers(0, 10))
def test_each_workers_first_batch_is_kept_for_it(workers: int, block: int, extra: int) -> None:
    ledger = Ledger(workers, "shared")
    total = workers * block + extra
    ledger.begin_epoch(range(total), block)
    ledger.open(total)

    greedy = []
    while drawn := ledger.draw(0):
        greedy.append(drawn)
    others = [ledger.draw(worker) for worker in range(1, workers)]

    assert all(len(drawn) == block for drawn in others)
    assert sum(map(len, greedy)) >= block
    # Nothing stays behind: what was kept and is not needed goes to whoever asks.
    while drawn := ledger.draw(0):
        greedy.append(drawn)
    assert sum(map(len, [*greedy, *others])) == total


def test_shares_are_equal_where_they_are_meant_to_be() -> None:
    ledger = Ledger(3, "sharded")
    ledger.begin_epoch(range(12), block=2)
    ledger.open(12)

    drawn = [list(ledger.draw(worker)) for worker in (0, 0, 0, 1, 1, 1, 2, 2, 2)]

    assert drawn == [[0, 1], [6, 7], [], [2, 3], [8, 9], [], [4, 5], [10, 11], []]


def test_what_was_out_when_an_epoch_was_left_is_lost_with_it() -> None:
    ledger = Ledger(1)
    ledger.begin_epoch(range(3))
    ledger.open(3)
    ledger.draw(0)

    ledger.begin_epoch(range(2))

    assert ledger.leased(0) == 0
    assert ledger.progress() == (0, 2)
    assert list(ledger.draw(0)) == []


def test_what_is_reclaimed_is_handed_out_first() -> None:
    ledger = Ledger(2)
    ledger.begin_epoch(range(6))
    ledger.open(6)
    assert [list(ledger.draw(worker)) for worker in (0, 1, 1, 0)] == [[0], [1], [2], [3]]

    assert ledger.requeue(1) == 2
    assert ledger.leased(1) == 0

    assert [list(ledger.draw(0)) for _ in range(5)] == [[1], [2], [4], [5], []]


def test_a_range_that_is_longer_than_what_a_worker_holds_is_refused_without_looking_at_each() -> None:
    ledger = Ledger(1)
    ledger.begin_epoch(range(3))
    ledger.open(3)
    ledger.draw(0)

    with pytest.raises(ValueError, match=f"reports {2**60} batches but holds 1"):
        ledger.complete(0, [range(2**60)])


def test_a_worker_reports_the_batches_that_it_names_and_not_the_oldest() -> None:
    ledger = Ledger(1)
    ledger.begin_epoch(range(3))
    ledger.open(3)
    for _ in range(3):
        ledger.draw(0)

    assert ledger.complete(0, [range(2, 3), range(1)]) == (2, 0)

    assert ledger.applied() == [(0, 1), (2, 3)]
    assert ledger.leased(0) == 1


def test_what_is_left_is_dealt_by_another_rule_from_a_stop_on() -> None:
    ledger = Ledger(2, "sharded")
    ledger.begin_epoch(range(8))
    ledger.open(2)
    for worker in (0, 1):
        ledger.complete(worker, [ledger.draw(worker)])

    ledger.deal("shared")
    ledger.open(6)

    assert [list(ledger.draw(0)) for _ in range(4)] == [[2], [3], [4], [5]]
    ledger.begin_epoch(range(2))
    ledger.open(2)
    assert list(ledger.draw(1)) == [0]


# --- workers that are lost, and that come -----------------------------------------------------------------------------


def test_the_share_of_a_lost_worker_goes_to_those_that_have_finished_their_own() -> None:
    ledger = Ledger(3, "sharded")
    ledger.begin_epoch(range(9))
    ledger.open(9)
    assert [list(ledger.draw(worker)) for worker in (0, 1, 2)] == [[0], [1], [2]]

    assert ledger.evict(1) == 1

    # First their own, then what it was handed, then what it would have been.
    assert [list(ledger.draw(0)) for _ in range(5)] == [[3], [6], [1], [4], [7]]
    assert [list(ledger.draw(2)) for _ in range(3)] == [[5], [8], []]


def test_a_worker_that_comes_back_has_its_share_again() -> None:
    ledger = Ledger(2, "sharded")
    ledger.begin_epoch(range(6))
    ledger.open(6)
    ledger.draw(1)
    ledger.evict(1)
    assert [list(ledger.draw(0)) for _ in range(4)] == [[0], [2], [4], [1]]

    ledger.admit(1)

    assert list(ledger.draw(0)) == []
    assert [list(ledger.draw(1)) for _ in range(3)] == [[3], [5], []]


def test_a_worker_beyond_those_that_the_run_began_with_shares_a_share() -> None:
    ledger = Ledger(2, "sharded")
    ledger.begin_epoch(range(6))
    ledger.open(6)

    ledger.admit(3)

    assert [list(ledger.draw(worker)) for worker in (3, 1, 3, 3)] == [[1], [3], [5], []]
    ledger.evict(1)
    assert list(ledger.draw(0)) == [0]


def test_no_first_batch_is_kept_for_a_lost_worker_nor_in_the_epochs_after_it() -> None:
    ledger = Ledger(2)
    for lost in (True, False):
        ledger.begin_epoch(range(2))
        ledger.open(2)
        assert list(ledger.draw(0)) == [0]
        if lost:
            assert list(ledger.draw(0)) == []
            ledger.evict(1)
        assert list(ledger.draw(0)) == [1]

    ledger.admit(1)
    ledger.begin_epoch(range(2))
    ledger.open(2)
    assert [list(ledger.draw(worker)) for worker in (0, 0, 1)] == [[0], [], [1]]


def test_streams_are_over_when_those_of_the_living_are() -> None:
    ledger = Ledger(3)
    ledger.begin_epoch(range(UNBOUNDED))
    ledger.open(UNBOUNDED)
    ledger.complete(0, [ledger.draw(0)])
    ledger.draw(2)
    ledger.release(0, [], stream_over=True)
    ledger.release(1, [], stream_over=True)
    assert ledger.progress()[1] > 0

    # What it was handed were permits: nobody is left who has a batch for them.
    assert ledger.evict(2) == 1

    assert ledger.progress() == (1, 0)


def test_what_a_lost_worker_was_handed_stays_for_the_next_segment_if_the_others_have_finished_this_one() -> None:
    ledger = Ledger(2)
    ledger.begin_epoch(range(2))
    ledger.open(2)
    ledger.complete(0, [ledger.draw(0)])
    ledger.draw(1)
    assert list(ledger.draw(0)) == []

    ledger.evict(1)

    assert ledger.progress() == (1, 1)
    ledger.open(1)
    assert list(ledger.draw(0)) == [1]
