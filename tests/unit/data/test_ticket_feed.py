"""A shared loader: the ranks' private ones cover every sample once, and what user code sees is DDP's share."""

from __future__ import annotations

import copy
import gc
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler, TensorDataset

from lightning_async.data import ticket_feed
from lightning_async.data.ledger import Ledger
from lightning_async.data.shared_loader import share_loader, shared_behind
from lightning_async.data.ticket_feed import LoaderError
from tests.harness import LoaderRank

pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

Mode = Literal["shared", "sharded"]
modes = pytest.mark.parametrize("mode", ["shared", "sharded"])
DATA = TensorDataset(torch.arange(42))
SEED = 3


@pytest.fixture(autouse=True)
def no_loader_outlives_its_test() -> Iterator[None]:
    """Dropped loaders end here: their workers would hold up the test in which the garbage is collected."""
    yield
    gc.collect()


def one_order(data: Any = DATA, ranks: int = 1, rank: int = 0, shuffle: bool = True) -> DistributedSampler[Any]:
    """The sampler that Lightning gives a train loader: one order for all ranks."""
    return DistributedSampler(data, ranks, rank, shuffle=shuffle, seed=SEED)


def make(kind: type[DataLoader[Any]] = DataLoader, data: Any = DATA, **arguments: Any) -> DataLoader[Any]:
    return kind(data, **({"batch_size": 4, "sampler": one_order(data)} | arguments))


def join(ledger: Ledger, number: int, loader: DataLoader[Any], ranks: int) -> LoaderRank:
    return LoaderRank(ledger, number, loader, ranks, SEED)


def run_segment(ranks: list[LoaderRank], speeds: tuple[int, ...] = (3, 1)) -> None:
    """Rank r computes ``speeds[r]`` batches in each round until nobody gets any more."""
    for rank in ranks:
        rank.open()
    while sum(rank.step() for rank, speed in zip(ranks, speeds, strict=True) for _ in range(speed)):
        continue


def run_epoch(ledger: Ledger, ranks: list[LoaderRank], epoch: int, segments: tuple[int, ...] = (3, 4)) -> None:
    assert len({rank.begin_epoch(epoch) for rank in ranks}) == 1
    total = ranks[0].feed.global_batches
    ledger.begin_epoch(range(total))
    for tickets in (*segments, *[total] * total):
        if not ledger.progress()[1]:
            return
        ledger.open(tickets)
        run_segment(ranks)


def train(
    kind: type[DataLoader[Any]], mode: Mode, epochs: int = 2, **arguments: Any
) -> tuple[list[LoaderRank], list[list[int]]]:
    """What two ranks of unlike speed train on in each epoch."""
    ledger = Ledger(2, mode)
    ranks = [join(ledger, number, make(kind, **arguments), 2) for number in range(2)]
    seen = []
    try:
        for epoch in range(epochs):
            run_epoch(ledger, ranks, epoch)
            seen.append(sorted(ranks[0].seen + ranks[1].seen))
            assert ledger.progress() == (ranks[0].feed.global_batches, 0)
            assert [ledger.leased(rank.number) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.shared.close()
    return ranks, seen


class Kept(DataLoader[Any]):
    """Keeps one iterator for all epochs, and its worker processes with it."""

    kept: Iterator[Any] | None = None

    def forever(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()

    def __iter__(self) -> Any:
        if self.kept is None:
            self.kept = self.forever()
        for _ in range(len(self)):
            yield next(self.kept)


class Looking(DataLoader[Any]):
    """Loads one batch ahead of the one that it delivers."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        ahead = next(iterator, None)
        while ahead is not None:
            batch, ahead = ahead, next(iterator, None)
            yield batch


class LookingToItsLength(DataLoader[Any]):
    """Loads one batch ahead, and ends by its own count with one in hand."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        ahead = next(iterator, None)
        for _ in range(len(self)):
            if ahead is None:
                return
            batch, ahead = ahead, next(iterator, None)
            yield batch


class OwnIterator(DataLoader[Any]):
    """Is its own iterator."""

    def __iter__(self) -> Any:
        self.iterator = super().__iter__()
        return self

    def __next__(self) -> Any:
        return next(self.iterator)


class Direct(DataLoader[Any]):
    """Asks its batch sampler itself."""

    def __iter__(self) -> Any:
        for indices in self.batch_sampler:
            yield self.collate_fn([self.dataset[index] for index in indices])


class Background:
    """Iterates in a thread, which fills a queue."""

    def __init__(self, iterator: Iterator[Any], ahead: int = 4) -> None:
        self.items: queue.Queue[Any] = queue.Queue(ahead)
        self.thread = threading.Thread(target=self.fill, args=(iterator,), daemon=True)
        self.thread.start()

    def fill(self, iterator: Iterator[Any]) -> None:
        for item in iterator:
            self.items.put(item)
        self.items.put(None)

    def __iter__(self) -> Background:
        return self

    def __next__(self) -> Any:
        item = self.items.get()
        if item is None:
            raise StopIteration
        return item


class Threaded(DataLoader[Any]):
    """Prefetches in a thread of its own."""

    def __iter__(self) -> Any:
        return Background(super().__iter__())


KINDS = [DataLoader, Kept, Looking, LookingToItsLength, OwnIterator, Direct, Threaded]
WORKERS: list[dict[str, Any]] = [
    {},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True},
    {"num_workers": 1, "prefetch_factor": 1},
    {"num_workers": 1, "prefetch_factor": 4},
    {"num_workers": 2, "in_order": False},
]


@modes
@pytest.mark.parametrize("workers", WORKERS, ids=str)
def test_ranks_of_unlike_speed_see_every_sample_once_over_several_segments(mode: Mode, workers: Any) -> None:
    ranks, seen = train(DataLoader, mode, **workers)

    assert seen == [list(range(42))] * 2
    if mode == "shared":
        assert len(ranks[0].seen) > len(ranks[1].seen) > 0
    # A slow rank's loader does not hoard what a fast rank could compute.
    assert max(rank.most_leased for rank in ranks) <= max(1, workers.get("num_workers", 0)) + 1


@modes
@pytest.mark.parametrize("workers", [WORKERS[0], WORKERS[1], WORKERS[2]], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_loader_that_iterates_in_its_own_way_covers_every_sample_once(
    kind: type[DataLoader[Any]], mode: Mode, workers: Any
) -> None:
    if kind is Direct and workers:
        workers = {}

    ranks, seen = train(kind, mode, **workers)

    assert seen == [list(range(42))] * 2
    assert [rank.left_out for rank in ranks] == [0, 0]


@modes
def test_a_thread_of_the_last_epoch_that_wakes_late_takes_no_batch_of_this_one(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It looks again once the tickets of the next epoch are drawn: a machine with much to do.
    monkeypatch.setattr(ticket_feed, "_LOOK_S", 0.05)
    wait = threading.Condition.wait

    def wake_late(self: threading.Condition, timeout: float | None = None) -> bool:
        woken = wait(self, timeout)
        if isinstance(self._lock, type(threading.RLock())) and threading.current_thread().daemon:
            self.release()
            time.sleep(0.02)
            self.acquire()
        return woken

    monkeypatch.setattr(threading.Condition, "wait", wake_late)

    ranks, seen = train(Threaded, mode, epochs=4)

    assert seen == [list(range(42))] * 4
    assert [rank.left_out for rank in ranks] == [0, 0]


class Short(DataLoader[Any]):
    """Ends after two batches."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        for _ in range(2):
            yield next(iterator)


@modes
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}], ids=str)
def test_a_loader_that_ends_early_gives_each_rank_what_it_has_in_an_epoch(mode: Mode, workers: Any) -> None:
    ledger = Ledger(2, mode)
    ranks = [join(ledger, number, make(Short, **workers), 2) for number in range(2)]

    for epoch in range(2):
        run_epoch(ledger, ranks, epoch)

        # As under DDP, over all segments of the epoch; and what the loaders had ahead is nobody's loss.
        assert [len(rank.seen) for rank in ranks] == [8, 8]
        assert len({*ranks[0].seen, *ranks[1].seen}) == 16
        assert ledger.progress() == (4, 0)
    for rank in ranks:
        rank.shared.close()


def test_what_a_loader_that_ends_early_has_no_batches_for_goes_to_the_others() -> None:
    ledger = Ledger(2, "shared")
    ranks = [join(ledger, number, make(kind), 2) for number, kind in enumerate([Short, DataLoader])]

    run_epoch(ledger, ranks, 0)

    assert len(ranks[0].seen) == 8
    assert sorted(ranks[0].seen + ranks[1].seen) == list(range(42))


class Filtering(DataLoader[Any]):
    """Leaves out the batches in which a certain sample is."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if not {7, 21} & set(batch[0].tolist()):
                yield batch


@modes
def test_what_a_loader_leaves_out_is_trained_on_by_nobody_and_counts_as_done(mode: Mode) -> None:
    order = [*one_order()]
    batches = [order[at : at + 4] for at in range(0, 42, 4)]
    kept = sorted(index for batch in batches if not {7, 21} & set(batch) for index in batch)

    ranks, seen = train(Filtering, mode, epochs=1)

    assert seen == [kept]
    assert sum(rank.left_out for rank in ranks) == sum(bool({7, 21} & set(batch)) for batch in batches)


class Early(DataLoader[Any]):
    """Has made its iterator before anybody could give it another sampler."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.iterator = super().__iter__()

    def __iter__(self) -> Any:
        return self.iterator


class Splitting(DataLoader[Any]):
    """Makes two batches of one."""

    def __iter__(self) -> Any:
        for (batch,) in super().__iter__():
            yield (batch[:2],)
            yield (batch[2:],)


@pytest.mark.parametrize("kind", [Early, Splitting])
def test_a_loader_whose_batches_belong_to_no_ticket_is_refused_by_name(kind: type[DataLoader[Any]]) -> None:
    rank = join(Ledger(1), 0, make(kind), 1)
    rank.ledger.begin_epoch(range(11))
    rank.ledger.open(11)
    rank.begin_epoch(0)
    rank.open()

    def run() -> None:
        assert rank.feed.has_next()
        iterator = iter(rank.shared.loader)
        for _ in range(2):
            assert rank.feed.has_next()
            next(iterator)
            rank.feed.deliver()

    with pytest.raises(LoaderError, match=f"{kind.__name__} delivers a batch beyond those"):
        run()


class Insatiable(DataLoader[Any]):
    """Asks for one more, for ever."""

    def __iter__(self) -> Any:
        def forever() -> Iterator[Any]:
            while True:
                yield from super(Insatiable, self).__iter__()

        batches = forever()
        ahead = next(batches)
        while True:
            batch, ahead = ahead, next(batches)
            yield batch


def test_a_loader_that_never_takes_no_for_an_answer_is_refused_by_name() -> None:
    with pytest.raises(LoaderError, match="Insatiable asks for another batch again and again"):
        train(Insatiable, "shared")


# --- threads ---------------------------------------------------------------------------------------------------------


class Pairing(DataLoader[Any]):
    """A thread that delivers nothing before it has three batches."""

    def __iter__(self) -> Any:
        def triples(iterator: Iterator[Any]) -> Iterator[Any]:
            held = []
            for batch in iterator:
                held.append(batch)
                if len(held) == 3:
                    yield from held
                    held = []
            yield from held

        return Background(triples(super().__iter__()))


def test_a_thread_that_waits_for_more_than_it_gets_is_told_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket_feed, "_STALEMATE_S", 0.05)
    monkeypatch.setattr(ticket_feed, "_LOOK_S", 0.01)

    _, seen = train(Pairing, "shared", epochs=1)

    assert seen == [list(range(42))]


# A thread that ends by SystemExit ends silently, but for pytest.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("endless", [False, True])
def test_a_loaders_thread_ends_when_the_loader_is_closed(monkeypatch: pytest.MonkeyPatch, endless: bool) -> None:
    monkeypatch.setattr(ticket_feed, "_LOOK_S", 0.01)

    class Endless(DataLoader[Any]):
        def __iter__(self) -> Any:
            def forever() -> Iterator[Any]:
                while True:
                    yield from super(Endless, self).__iter__()

            return Background(forever())

    rank = join(Ledger(1), 0, make(Endless if endless else Threaded), 1)
    rank.ledger.begin_epoch(range(11))
    rank.ledger.open(3)
    rank.begin_epoch(0)
    rank.open()
    while rank.step():
        continue
    background: Any = rank.iterator
    assert background.thread.is_alive()

    rank.shared.close()
    background.thread.join(20.0)

    assert not background.thread.is_alive()
    assert len(rank.seen) == 12


# --- what user code sees ---------------------------------------------------------------------------------------------


def ddp_share(rank: int, epoch: int, **arguments: Any) -> list[list[int]]:
    sampler = one_order(ranks=2, rank=rank)
    sampler.set_epoch(epoch)
    return [batch.tolist() for (batch,) in DataLoader(DATA, batch_size=4, sampler=sampler, **arguments)]


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
@pytest.mark.parametrize("kind", [DataLoader, Kept, OwnIterator])
def test_a_pass_of_user_code_sees_ddps_share_and_training_goes_on_untouched(
    kind: type[DataLoader[Any]], workers: Any
) -> None:
    ledger = Ledger(2, "shared")
    ranks = [join(ledger, number, make(kind, **workers), 2) for number in range(2)]
    for rank in ranks:
        rank.begin_epoch(1)
    ledger.begin_epoch(range(11))
    ledger.open(11)
    for rank in ranks:
        rank.open()

    passes: list[list[list[int]]] = [[], []]
    peeks: list[Iterator[Any]] = [iter(rank.visible) for rank in ranks]
    while sum(rank.step() for rank in ranks):
        for number, peek in enumerate(peeks):
            passes[number] += [batch.tolist() for (batch,) in [next(peek, [None])] if batch is not None]
    for number, peek in enumerate(peeks):
        while item := next(peek, None):
            passes[number].append(item[0].tolist())

    assert passes == [ddp_share(number, epoch=1) for number in range(2)]
    assert sorted(ranks[0].seen + ranks[1].seen) == list(range(42))
    assert ledger.progress() == (11, 0)
    for rank in ranks:
        del rank.iterator
        rank.shared.close()
        rank.visible._iterator = None


def test_user_code_reads_lengths_and_places_as_under_ddp() -> None:
    loader, reference = make(), make(sampler=one_order(ranks=2, rank=1))
    share_loader(loader, 2, 1, SEED)

    for one, other in ((loader, reference), (loader.batch_sampler, reference.batch_sampler)):
        assert len(one) == len(other)  # type: ignore[arg-type]
    mine, theirs = loader.sampler, reference.sampler
    assert isinstance(mine, DistributedSampler)
    assert isinstance(theirs, DistributedSampler)
    for name in ("num_replicas", "rank", "num_samples", "total_size", "epoch", "seed", "shuffle"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert (len(mine), list(mine)) == (len(theirs), list(theirs))
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert loader.batch_sampler.sampler is mine
    assert list(loader.batch_sampler) == list(reference.batch_sampler)  # type: ignore[arg-type]
    assert copy.deepcopy(loader.batch_sampler) is loader.batch_sampler
    assert share_loader(loader, 2, 1, SEED) is shared_behind(loader)


class Marking(BatchSampler):
    """A batch sampler with an attribute, a property and a method, as users have them."""

    flag = True
    epoch = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield [(self.flag, index) for index in batch]

    @property
    def size(self) -> int:
        return self.batch_size

    @size.setter
    def size(self, value: int) -> None:
        self.batch_size = value

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]


class Marked(Dataset[Any]):
    def __len__(self) -> int:
        return 42

    def __getitem__(self, key: Any) -> Any:
        return (key[1] if key[0] else -key[1],)


def marked(ranks: int = 2) -> DataLoader[Any]:
    data = Marked()
    loader: DataLoader[Any] = DataLoader(data, batch_sampler=Marking(one_order(data), 4, False))
    share_loader(loader, ranks, 0, SEED)
    return loader


def test_what_user_code_sets_on_its_batch_sampler_holds_from_the_next_epoch_on() -> None:
    loader = marked()
    shared, batches = shared_behind(loader), loader.batch_sampler
    assert shared is not None
    assert isinstance(batches, Marking)
    before = shared.begin_epoch(0, None)

    batches.flag = False
    batches.size = 7
    batches.set_epoch(5)
    with pytest.raises(AttributeError):
        batches.missing  # noqa: B018
    after = shared.begin_epoch(1, None)

    assert (batches.flag, batches.size, batches.epoch, loader.sampler is batches.sampler) == (False, 7, 5, False)
    assert before != after
    assert (len(loader), len(batches), shared.feed.global_batches) == (3, 3, 6)
    order = one_order(Marked())
    order.set_epoch(5)
    assert [index for batch in loader for index in batch[0].tolist()] == [
        -index for position in (0, 2, 4) for index in list(order)[7 * position : 7 * position + 7]
    ]


def test_what_user_code_changes_on_the_loader_holds_from_the_next_epoch_on() -> None:
    loader = make()
    shared = share_loader(loader, 1, 0, SEED)
    collate = loader.collate_fn
    private: Any = shared.loader
    private.kept = "of the private loader"

    loader.collate_fn = lambda samples: [collate(samples)[0] + 1000]
    loader.note = "new"  # type: ignore[attr-defined]
    shared.begin_epoch(0, None)

    assert private.collate_fn is loader.collate_fn
    assert (private.note, private.kept) == ("new", "of the private loader")
    assert not hasattr(loader, "kept")


def test_a_batch_sampler_that_is_built_over_the_loaders_sampler_takes_the_others_place() -> None:
    ledger = Ledger(2, "shared")
    ranks = [join(ledger, number, make(), 2) for number in range(2)]
    for rank in ranks:
        batches = BatchSampler(rank.visible.sampler, 6, drop_last=False)
        object.__setattr__(rank.visible, "batch_sampler", batches)

    run_epoch(ledger, ranks, 0)

    assert sorted(ranks[0].seen + ranks[1].seen) == list(range(42))
    assert ledger.progress() == (7, 0)


def test_a_batch_sampler_that_is_one_ranks_alone_is_refused_with_the_way_out() -> None:
    loader = make()
    shared = share_loader(loader, 2, 0, SEED)
    object.__setattr__(loader, "batch_sampler", BatchSampler(SequentialSampler(range(8)), 4, drop_last=False))

    with pytest.raises(LoaderError, match="DataLoader cannot be shared by all ranks any more"):
        shared.begin_epoch(0, None)


def test_loaders_that_do_not_batch_are_shared_too() -> None:
    ledger = Ledger(1)
    loader: DataLoader[Any] = DataLoader(DATA, batch_size=None, sampler=one_order(shuffle=False))
    shared = share_loader(loader, 1, 0, SEED)
    ledger.begin_epoch(range(42))
    ledger.open(42)
    shared.begin_epoch(0, None)
    shared.feed.open(lambda: ledger.draw(0), lambda tickets, over: None, lambda tickets: None)

    iterator = iter(shared.loader)
    seen = []
    while shared.feed.has_next():
        seen.append(int(next(iterator)[0]))
        assert shared.feed.deliver() == 1

    assert seen == list(range(42))
    assert [int(sample) for (sample,) in loader] == seen


def test_outside_a_segment_nothing_is_drawn() -> None:
    rank = join(Ledger(1), 0, make(), 1)
    rank.begin_epoch(0)

    assert list(rank.shared.loader) == []
    assert not rank.feed.has_next()


def test_an_order_that_is_shorter_than_its_sampler_says_ends_the_epoch_on_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning_async.data import orders

    monkeypatch.setattr(orders, "_SAMPLES_AHEAD", 1)
    monkeypatch.setattr(orders, "_STRIDE", 3)

    class TooMany(BatchSampler):
        def __len__(self) -> int:
            return 1000

    ledger = Ledger(2, "shared")
    ranks = []
    for number in range(2):
        loader: DataLoader[Any] = DataLoader(DATA, batch_sampler=TooMany(one_order(), 4, False))
        ranks.append(join(ledger, number, loader, 2))

    run_epoch(ledger, ranks, 0)

    assert sorted(ranks[0].seen + ranks[1].seen) == list(range(42))
    assert ledger.progress() == (11, 0)
