"""The ranks of an attempt find each other in a store that is full of what ranks of before have said."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_async.runtime import attempts
from lightning_async.runtime.attempts import agree_on_attempt, keeps_its_store
from tests.harness import Call, eventually

pytestmark = pytest.mark.timeout(30)
LONG, SHORT = timedelta(seconds=20), timedelta(seconds=0.1)


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def come(store: dist.Store, rank: int, ranks: int, timeout: timedelta = LONG) -> Call:
    """A rank that comes to the store, in a thread of its own."""
    return Call(lambda: agree_on_attempt(store, rank, ranks, timeout))


def names(calls: list[Call]) -> set[str]:
    """What they have agreed on."""
    for call in calls:
        call.join(20)
        assert call.error is None
    return {call.result for call in calls}


def test_every_attempt_of_a_job_has_one_name_of_its_own(store: dist.Store) -> None:
    agreed = [names([come(store, rank, ranks) for rank in range(ranks)]) for ranks in (3, 3, 2, 4, 1)]

    assert [len(each) for each in agreed] == [1] * 5
    assert len(set.union(*agreed)) == 5


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_rank_that_comes_long_before_the_others_waits_for_those_of_its_own_attempt(
    store: dist.Store, first: int
) -> None:
    before = names([come(store, rank, 3) for rank in range(3)])
    early = come(store, first, 3)
    # It sees all that the attempt before has left.
    assert not eventually(lambda: not early.is_alive(), 0.3)
    now = names([early, *(come(store, rank, 3) for rank in range(3) if rank != first)])

    assert len(now) == 1
    assert now.isdisjoint(before)


class Mortal:
    """Ranks that can be ended while they wait for others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._doomed: set[threading.Thread] = set()
        self._look: Any = attempts._wait_before
        monkeypatch.setattr(attempts, "_wait_before", self._wait_or_end)

    def _wait_or_end(self, *arguments: Any) -> None:
        if threading.current_thread() in self._doomed:
            raise SystemExit
        self._look(*arguments)

    def kill(self, *ranks: Call) -> None:
        self._doomed.update(ranks)
        for rank in ranks:
            assert isinstance(rank.ended(), SystemExit)


def test_ranks_that_were_killed_on_their_way_are_not_waited_for(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal, killed = Mortal(monkeypatch), [come(store, 1, 3), come(store, 0, 3)]
    # Rank 1 has said hello, was answered, and has confirmed; rank 2 has not come.
    assert eventually(lambda: store.num_keys() == 3)
    mortal.kill(*killed)

    assert len(names([come(store, rank, 3) for rank in (2, 1, 0)])) == 1


def test_a_rank_that_is_replaced_after_it_has_confirmed_is_waited_for_again(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where torchrun of another host starts its rank again, of which this host's hears nothing."""
    mortal, rank_0, rank_1 = Mortal(monkeypatch), come(store, 0, 3), come(store, 1, 3)
    assert eventually(lambda: store.num_keys() == 3)
    mortal.kill(rank_1)

    assert len(names([rank_0, come(store, 2, 3), come(store, 1, 3)])) == 1


@pytest.mark.parametrize(
    ("present", "told"),
    [((0,), "ranks 1, 2 have not come"), ((0, 2), "rank 1 has not come"), ((1,), "rank 0 has not come")],
)
def test_who_has_not_come_is_named(store: dist.Store, present: tuple[int, ...], told: str) -> None:
    names([come(store, rank, 3) for rank in range(3)])

    calls = [come(store, rank, 3, SHORT if rank == present[0] else LONG) for rank in present]

    calls[0].join(10)
    assert isinstance(calls[0].error, TimeoutError)
    assert told in str(calls[0].error)
    # Those that are left find the missing ones.
    calls += [come(store, rank, 3) for rank in range(3) if rank not in present[1:]]
    assert len(names(calls[1:])) == 1


@pytest.mark.parametrize(("said", "keeps"), [({}, False), ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, True)])
def test_only_torchruns_store_outlives_the_ranks(said: dict[str, str], keeps: bool) -> None:
    assert keeps_its_store(said) is keeps
