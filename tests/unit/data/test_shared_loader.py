"""What user code sees of a loader that all ranks share: DDP's share, and its own objects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_async.data.ledger import Ledger
from lightning_async.data.shared_loader import share_loader, shared_behind
from lightning_async.data.ticket_feed import LoaderError
from tests.loaders import (
    DATA,
    SEED,
    Kept,
    OwnIterator,
    join,
    make,
    one_order,
    run_epoch,
    uses_loaders,
)

pytestmark = uses_loaders


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
