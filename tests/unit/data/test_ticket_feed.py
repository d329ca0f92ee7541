"""The feed of a private loader: whichever way that iterates, the ranks cover every sample once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_async.data import ticket_feed
from lightning_async.data.ledger import Ledger
from lightning_async.data.ticket_feed import LoaderError
from tests.loaders import (
    Background,
    Direct,
    Early,
    Kept,
    Looking,
    LookingToItsLength,
    Mode,
    OwnIterator,
    Threaded,
    join,
    make,
    modes,
    one_order,
    run_epoch,
    train,
    uses_loaders,
)
from tests.soaked import soaked

pytestmark = uses_loaders


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
@pytest.mark.parametrize("workers", soaked(WORKERS, WORKERS[3]), ids=str)
def test_ranks_of_unlike_speed_see_every_sample_once_over_several_segments(mode: Mode, workers: Any) -> None:
    ranks, seen = train(DataLoader, mode, **workers)

    assert seen == [list(range(42))] * 2
    if mode == "shared":
        assert len(ranks[0].seen) > len(ranks[1].seen) > 0
    # A slow rank's loader does not hoard what a fast rank could compute.
    assert max(rank.most_leased for rank in ranks) <= max(1, workers.get("num_workers", 0)) + 1


@modes
@pytest.mark.parametrize("workers", soaked(WORKERS[:3], WORKERS[2]), ids=str)
@pytest.mark.parametrize("kind", soaked(KINDS[1:], LookingToItsLength))
def test_a_loader_that_iterates_in_its_own_way_covers_every_sample_once(
    kind: type[DataLoader[Any]], mode: Mode, workers: Any
) -> None:
    if kind is Direct:
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
