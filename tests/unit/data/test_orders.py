"""The order of an epoch's batches: the same on every rank, drawn no further than needed, compared by value."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from lightning_async.data import orders
from lightning_async.data.orders import BatchSource, walk

pytestmark = pytest.mark.timeout(60)


def drawn(source: BatchSource) -> list[Any]:
    return [source[ticket] for ticket in range(source.drawn)]


def test_all_ranks_walk_one_order_that_is_another_one_in_each_epoch() -> None:
    walked = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # what each rank's own generator says must not matter
        source = BatchSource(BatchSampler(RandomSampler(range(20)), 3, drop_last=False), seed=5)
        epochs = []
        for epoch in (0, 1):
            source.begin_epoch(epoch)
            epochs.append(drawn(source))
        walked.append(epochs)

    assert walked[0] == walked[1]
    assert walked[0][0] != walked[0][1]
    assert all(sorted(index for batch in epoch for index in batch) == list(range(20)) for epoch in walked[0])


def test_drawing_an_order_leaves_the_global_generators_alone() -> None:
    class Greedy(SequentialSampler):
        def __iter__(self) -> Iterator[int]:
            for index in super().__iter__():
                torch.rand(1)
                np.random.rand()
                random.random()
                yield index

    def numbers() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    source = BatchSource(BatchSampler(Greedy(range(20)), 3, drop_last=False), seed=5)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = numbers()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    source.begin_epoch(0)
    walk(source.batches, seed=7)

    assert numbers() == expected


class Endless:
    """Batches without end, which it counts."""

    def __init__(self, length: int | None = 10**12) -> None:
        self.length, self.made = length, 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            self.made += 1
            yield [self.made, random.randrange(10**9)]

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length


def test_a_limited_epoch_draws_no_more_than_its_limit() -> None:
    batches = Endless()
    source = BatchSource(batches, seed=0)

    source.begin_epoch(0, limit=20)

    assert (batches.made, source.drawn, source.is_complete, source.has(20)) == (20, 20, True, False)


@pytest.mark.parametrize("length", [10**12, None])
def test_an_order_without_end_is_drawn_as_it_is_trained_on(monkeypatch: pytest.MonkeyPatch, length: int | None) -> None:
    monkeypatch.setattr(orders, "_SAMPLES_AHEAD", 100)
    first, second = (BatchSource(Endless(length), seed=0) for _ in range(2))
    begun = [source.begin_epoch(3) for source in (first, second)]
    made = first.batches.made

    # One rank is far ahead of the other, which draws much from its generators meanwhile.
    assert first.has(5000)
    random.random()
    assert second.has(5000)

    assert begun[0] == begun[1]
    assert made <= 1024 < 5000 <= first.batches.made <= 5000 + 1024
    assert [first[ticket] for ticket in range(5000)] == [second[ticket] for ticket in range(5000)]
    assert first.digests == second.digests
    assert not first.is_complete


def test_an_order_that_ends_before_its_sampler_has_said_tells_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_SAMPLES_AHEAD", 10)

    class TooMany(list[list[int]]):
        def __len__(self) -> int:
            return 5000

    source = BatchSource(TooMany([[index] for index in range(3000)]), seed=0)
    source.begin_epoch(0)

    assert (source.drawn, source.is_complete) == (5000, False)
    assert (source.has(2999), source.has(3000), source.drawn) == (True, False, 3000)


@dataclass
class Crop:
    index: int
    size: tuple[int, int]


class Plain:
    def __init__(self, index: int) -> None:
        self.index = index


EQUAL: list[tuple[Any, Any]] = [
    ([1, 2, 3], (1, 2, 3)),
    ([1, 2, 3], np.array([1, 2, 3])),
    ([1, 2, 3], torch.tensor([1, 2, 3])),
    ([1, 2, 3], [np.int64(1), torch.tensor(2), 3]),
    ([(True, 1)], [[np.bool_(True), np.int32(1)]]),
    ([("a", 1.5)], [["a", np.float64(1.5)]]),
    ([{"a": 1, "b": 2}], [{"b": np.int64(2), "a": 1}]),
    ([{3, 1, 2}], [{2, 3, 1}]),
    ([Crop(1, (2, 3))], [Crop(1, (2, 3))]),
    ([Plain(4)], [Plain(4)]),
    (5, np.int64(5)),
    ("key", "key"),
]
UNLIKE: list[tuple[Any, Any]] = [
    ([[1, 2], [3]], [[1], [2, 3]]),
    ([[1, 2]], [[2, 1]]),
    ([[(1, 2)]], [[(1, 3)]]),
    ([[{"a": 1}]], [[{"a": 2}]]),
    ([[Crop(1, (2, 3))]], [[Crop(1, (2, 4))]]),
    ([[Plain(4)]], [[Plain(5)]]),
    ([["a"]], [["b"]]),
    ([[1]], [[1], [1]]),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_orders_of_equal_value_are_the_same_whatever_their_types(one: Any, other: Any) -> None:
    digests = [BatchSource([batch, batch], seed=0).begin_epoch(0) for batch in (one, other)]

    assert digests[0] == digests[1]


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_orders_of_unlike_value_are_told_apart(one: Any, other: Any) -> None:
    digests = [BatchSource(batches, seed=0).begin_epoch(0) for batches in (one, other)]

    assert digests[0] != digests[1]


@given(
    order=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=8), limit=st.integers(1, 8)
)
def test_an_order_is_known_again_under_another_limit(order: list[list[int]], limit: int) -> None:
    source, saved = BatchSource(order, seed=0), BatchSource(order, seed=0)
    digest = saved.begin_epoch(0, limit)

    source.begin_epoch(0)

    assert source.matches(digest)
    assert not source.matches(BatchSource([*order[:-1], [10]], seed=0).begin_epoch(0))
    assert not source.matches(BatchSource([*order, [1]], seed=0).begin_epoch(0))
    assert not source.matches("")


@pytest.mark.parametrize(
    ("samples", "size", "sizes"),
    [(49, 16, [16, 16, 9, 8]), (7, 3, [3, 2, 2]), (50, 16, [16, 16, 16, 2]), (3, 2, [2, 1])],
)
def test_a_single_sample_that_is_left_over_gets_half_of_the_batch_before_it(
    samples: int, size: int, sizes: list[int]
) -> None:
    source = BatchSource(BatchSampler(SequentialSampler(range(samples)), size, False), seed=0, shares_rest=True)

    source.begin_epoch(0)

    assert [len(batch) for batch in drawn(source)] == sizes
    assert [index for batch in drawn(source) for index in batch] == list(range(samples))


def test_a_walk_leaves_a_samplers_own_generator_where_it_was() -> None:
    sampler = WeightedRandomSampler([1.0] * 20, 20, generator=torch.Generator().manual_seed(3))
    batches = BatchSampler(sampler, 4, drop_last=False)

    walked = walk(batches, seed=0)

    assert walked == list(batches)
