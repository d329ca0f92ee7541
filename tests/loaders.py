"""Loaders that iterate in ways of their own, and ranks of unlike speed that share them in one process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_async.data.ledger import Ledger
from tests.harness import LoaderRank

Mode = Literal["shared", "sharded"]
DATA = TensorDataset(torch.arange(42))
SEED = 3

# For modules whose tests use real loaders.
uses_loaders = [
    pytest.mark.timeout(100),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("no_loader_outlives_its_test"),
]
modes = pytest.mark.parametrize("mode", ["shared", "sharded"])


# --- ranks in one process --------------------------------------------------------------------------------------------


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


# --- kinds of loaders ------------------------------------------------------------------------------------------------


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


class Early(DataLoader[Any]):
    """Has made its iterator before anybody could give it another sampler."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.iterator = super().__iter__()

    def __iter__(self) -> Any:
        return self.iterator
