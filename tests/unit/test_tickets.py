"""Every batch of an epoch is handed out once, whatever the order in which ranks ask, finish and fall silent."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from lightning_async.ranges import UNBOUNDED
from lightning_async.tickets import BatchSource, Ledger, TicketSampler, share_loader

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
    names = ["draw"] * 6 + ["complete"] * 3 + ["open", "close", "reclaim"]
    return st.lists(
        st.builds(Op, st.sampled_from(names), st.integers(0, workers - 1), st.integers(0, 6)), min_size=10, max_size=60
    )


class Model:
    """What the ledger must have done so far."""

    def __init__(self, tickets: range) -> None:
        self.free = set(tickets)
        self.leased: dict[int, deque[int]] = {}
        self.applied: list[int] = list(range(tickets.start))

    def draw(self, ledger: Ledger, worker: int) -> range:
        drawn = ledger.draw(worker)
        assert self.free.issuperset(drawn), "handed out a ticket that is out, applied or foreign"
        self.free.difference_update(drawn)
        self.leased.setdefault(worker, deque()).extend(drawn)
        return drawn

    def complete(self, ledger: Ledger, worker: int, count: int) -> None:
        mine = self.leased.setdefault(worker, deque())
        if count > len(mine):
            with pytest.raises(ValueError, match=f"reports {count} batches but was handed {len(mine)}"):
                ledger.complete(worker, count)
            return
        oldest = [mine.popleft() for _ in range(count)]
        assert list(ledger.complete(worker, count)) == oldest
        self.applied += oldest

    def reclaim(self, ledger: Ledger, worker: int) -> None:
        mine = self.leased.get(worker, deque())
        self.leased[worker] = deque()
        assert ledger.reclaim(worker) == len(mine)
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
        if op.name == "draw":
            drawn = model.draw(ledger, op.worker)
            assert len(drawn) <= block
            if mode == "sharded":
                assert {ticket // block % workers for ticket in drawn} <= {op.worker}
        elif op.name == "complete":
            model.complete(ledger, op.worker, op.count)
        elif op.name == "reclaim":
            model.reclaim(ledger, op.worker)
        elif op.name == "open":
            ledger.open(op.count)
        else:
            ledger.close()
            assert [list(model.draw(ledger, worker)) for worker in range(workers)] == [[]] * workers
        assert ledger.progress() == (len(model.applied), len(model.free))
        assert all(ledger.leased(worker) == len(leased) for worker, leased in model.leased.items())

    # The rest of the epoch: every rank finishes what it has, and all together compute what is left.
    ledger.open(total)
    while sum(len(model.draw(ledger, worker)) for worker in range(workers)):
        continue
    for worker, leased in model.leased.items():
        model.complete(ledger, worker, len(leased))
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
                model.complete(ledger, op.worker, op.count)
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
                model.complete(ledger, worker, len(leased))
            assert sorted(model.applied) == list(range(total))


def test_what_a_worker_gives_back_is_for_others_and_its_kept_first_batch_too() -> None:
    ledger = Ledger(2, "shared")
    ledger.begin_epoch(range(4), block=2)
    ledger.open(4)
    assert [list(ledger.draw(worker)) for worker in (0, 0)] == [[0, 1], []]

    ledger.give_back(0, 1, stream_over=True)
    ledger.give_back(1, 0, stream_over=False)

    assert list(ledger.draw(0)) == []
    assert [list(ledger.draw(1)) for _ in range(3)] == [[1], [2, 3], []]
    with pytest.raises(ValueError, match="gives back 4 batches but was handed 3"):
        ledger.give_back(1, 4, stream_over=True)


def test_an_epoch_is_over_when_every_stream_is() -> None:
    ledger = Ledger(2, "shared")
    ledger.begin_epoch(range(UNBOUNDED))
    ledger.open(UNBOUNDED)
    ledger.complete(0, len(ledger.draw(0)))

    ledger.give_back(0, 0, stream_over=True)
    assert ledger.progress()[1] > 0
    ledger.give_back(1, len(ledger.draw(1)), stream_over=True)

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

    assert ledger.reclaim(1) == 2
    assert ledger.leased(1) == 0

    assert [list(ledger.draw(0)) for _ in range(5)] == [[1], [2], [4], [5], []]


# --- the sampler, in real loaders ------------------------------------------------------------------------------------


class Loop:
    """A rank's training loop, as far as its loader is concerned."""

    def __init__(self, ledger: Ledger, worker: int, loader: DataLoader[Any], ranks: int) -> None:
        self.ledger = ledger
        self.worker = worker
        self.loader = loader
        self.sampler = share_loader(loader, ranks, seed=3)
        self.iterator: Iterator[Any] | None = None
        self.seen: list[int] = []
        self.most_leased = 0

    def open(self) -> None:
        self.iterator = None
        self.sampler.open(lambda: self.ledger.draw(self.worker))

    def step(self) -> bool:
        """Computes one batch; False if there is none."""
        if not self.sampler.has_next():
            return False
        if self.iterator is None:
            self.iterator = iter(self.loader)
        self.sampler.allow_another()
        (batch,) = next(self.iterator)
        self.most_leased = max(self.most_leased, self.ledger.leased(self.worker))
        assert self.sampler.take_samples() == len(batch)
        self.seen += batch.tolist()
        self.ledger.complete(self.worker, 1)
        return True


def loops(ledger: Ledger, ranks: int, samples: int = 42, **arguments: Any) -> list[Loop]:
    dataset = TensorDataset(torch.arange(samples))
    return [Loop(ledger, worker, DataLoader(dataset, batch_size=4, **arguments), ranks) for worker in range(ranks)]


def run_segment(ranks: list[Loop], speeds: tuple[int, ...]) -> None:
    """Rank r computes ``speeds[r]`` batches in each round until nobody gets any more."""
    for rank in ranks:
        rank.open()
    while sum(rank.step() for rank, speed in zip(ranks, speeds, strict=True) for _ in range(speed)):
        continue


LOADERS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True},
    {"num_workers": 1, "prefetch_factor": 4},
]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("mode", ["shared", "sharded"])
@pytest.mark.parametrize("arguments", LOADERS, ids=str)
def test_ranks_of_unlike_speed_see_every_sample_once_over_several_segments(mode: Mode, arguments: Any) -> None:
    ledger = Ledger(2, mode)
    ranks = loops(ledger, 2, shuffle=True, **arguments)
    total = ranks[0].sampler.global_batches

    for epoch in range(2):
        ledger.begin_epoch(range(total))
        for rank in ranks:
            rank.seen.clear()
            rank.sampler.begin_epoch(epoch)
        for tickets in (3, 4, total):
            ledger.open(tickets)
            run_segment(ranks, speeds=(3, 1))

        assert sorted(ranks[0].seen + ranks[1].seen) == list(range(42))
        assert ledger.progress() == (11, 0)
    if mode == "shared":
        assert len(ranks[0].seen) > len(ranks[1].seen) > 0
    # A slow rank's loader does not hoard what a fast rank could compute.
    allowed = max(1, arguments["num_workers"]) + 1
    assert max(rank.most_leased for rank in ranks) <= allowed
    for rank in ranks:
        rank.iterator = None
        rank.loader._iterator = None


def test_all_ranks_walk_one_order_that_is_another_one_in_each_epoch() -> None:
    orders = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # what each rank's own generator says must not matter
        source = BatchSource(BatchSampler(RandomSampler(range(20)), 3, drop_last=False), seed=5)
        epochs = []
        for epoch in (0, 1):
            source.begin_epoch(epoch)
            epochs.append([source[ticket] for ticket in range(len(source))])
        orders.append(epochs)

    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]
    assert all(sorted(index for batch in epoch for index in batch) == list(range(20)) for epoch in orders[0])


def test_drawing_an_order_leaves_the_global_generator_alone() -> None:
    source = BatchSource(BatchSampler(RandomSampler(range(20)), 3, drop_last=False), seed=5)
    torch.manual_seed(1)
    expected = torch.rand(3)

    torch.manual_seed(1)
    source.begin_epoch(0)

    assert torch.rand(3).equal(expected)


def test_the_sampler_shows_the_length_that_ddp_would_have() -> None:
    batches = BatchSampler(SequentialSampler(range(10)), 2, drop_last=True)
    sampler = TicketSampler(BatchSource(batches, seed=0), world_size=3, prefetch=0)

    assert (sampler.global_batches, len(sampler)) == (5, 2)
    assert (sampler.batch_size, sampler.drop_last) == (2, True)
    assert sampler.sampler is batches.sampler


def test_outside_a_segment_nothing_is_drawn() -> None:
    batches = BatchSampler(SequentialSampler(range(10)), 2, drop_last=False)
    sampler = TicketSampler(BatchSource(batches, seed=0), world_size=1, prefetch=0)
    sampler.begin_epoch(0)

    # Lightning calls iter() on the loader while it sets up.
    assert list(sampler) == []
    assert not sampler.has_next()


def test_loaders_that_do_not_batch_are_shared_too() -> None:
    ledger = Ledger(1)
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(5)), batch_size=None)
    sampler = share_loader(loader, 1, seed=0)
    assert share_loader(loader, 1, seed=0) is sampler
    ledger.begin_epoch(range(5))
    ledger.open(5)
    sampler.begin_epoch(0)
    sampler.open(lambda: ledger.draw(0))

    seen = []
    iterator = iter(loader)
    while sampler.has_next():
        sampler.allow_another()
        seen.append(int(next(iterator)[0]))
        assert sampler.take_samples() == 1

    assert seen == [0, 1, 2, 3, 4]
