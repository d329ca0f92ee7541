"""The staleness bound: examples of each rule, and what the rules mean for any set of readers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.holder.staleness import admissible, feasible, is_stale, readable, resolve_max_staleness


@pytest.mark.parametrize(
    ("reads", "version", "tau", "expected"),
    [
        ([], 5, 0, True),
        ([5], 5, 0, True),
        ([4], 5, 0, False),
        ([5, 5], 5, 0, False),
        ([5, 5], 5, 1, True),
        ([5, 4, 3], 5, 2, True),
        ([3, 3], 5, 2, False),
        ([5, 5, 3, 4], 6, 4, True),
        ([5, 5, 3, 4], 6, 3, False),
        ([0, 0, 0], 10**9, None, True),
    ],
)
def test_feasible(reads: list[int], version: int, tau: int | None, expected: bool) -> None:
    assert feasible(iter(reads), version, tau) is expected


def test_admissible_asks_whether_the_rest_fits_one_version_later() -> None:
    assert admissible([4], version=5, max_staleness=2)
    assert not admissible([4, 4], version=5, max_staleness=2)
    assert admissible([], version=5, max_staleness=0)
    assert admissible([0, 0], version=99, max_staleness=None)


def test_readable_while_at_most_tau_workers_are_outstanding() -> None:
    assert readable([], version=5, max_staleness=0)
    assert not readable([5], version=5, max_staleness=0)
    assert readable([4, 5], version=5, max_staleness=2)
    assert not readable([4, 5, 5], version=5, max_staleness=2)
    assert readable([5] * 99, version=5, max_staleness=None)


def test_is_stale_beyond_the_bound_only() -> None:
    assert not is_stale(3, version=5, max_staleness=2)
    assert is_stale(2, version=5, max_staleness=2)
    assert not is_stale(0, version=5, max_staleness=None)


def test_resolve_max_staleness() -> None:
    assert resolve_max_staleness("auto", world_size=3) == 12
    assert resolve_max_staleness(7, world_size=3) == 7
    assert resolve_max_staleness(0, world_size=3) == 0
    assert resolve_max_staleness(None, world_size=3) is None


@pytest.mark.parametrize("value", [-1, 1.5, True, "none", "4"])
def test_resolve_max_staleness_refuses_what_is_no_bound(value: object) -> None:
    with pytest.raises(ValueError, match="max_staleness must be"):
        resolve_max_staleness(value, world_size=3)  # type: ignore[arg-type]


def test_resolve_max_staleness_refuses_an_empty_world() -> None:
    with pytest.raises(ValueError, match="world_size"):
        resolve_max_staleness("auto", world_size=0)


def in_time_in_some_order(reads: Sequence[int], version: int, tau: int, per_update: int = 1, filled: int = 0) -> bool:
    """The definition itself: some order of taking them, ``per_update`` for each version, keeps every deadline."""
    return any(
        all(version + (filled + i) // per_update <= read + tau for i, read in enumerate(order))
        for order in permutations(reads)
    )


def no_window_is_overfull(reads: Sequence[int], version: int, tau: int, per_update: int = 1, filled: int = 0) -> bool:
    """Hall's condition, for sets too large to permute: no deadline has more gradients due than places."""
    return all(sum(read <= due for read in reads) <= (due + tau - version + 1) * per_update - filled for due in reads)


# Gradients that make a version, and how many of them it has already.
places = st.integers(1, 5).flatmap(lambda per_update: st.tuples(st.just(per_update), st.integers(0, per_update - 1)))


@given(
    reads=st.lists(st.integers(0, 8), max_size=6),
    version=st.integers(0, 8),
    tau=st.integers(0, 10),
    place=places,
)
def test_feasible_means_that_some_order_keeps_every_deadline(
    reads: list[int], version: int, tau: int, place: tuple[int, int]
) -> None:
    assert feasible(reads, version, tau, *place) == in_time_in_some_order(reads, version, tau, *place)
    assert feasible(reads, version, tau, *place) == no_window_is_overfull(reads, version, tau, *place)


@given(
    reads=st.lists(st.integers(0, 8), max_size=8),
    version=st.integers(8, 12),
    tau=st.integers(0, 12),
    place=places,
)
def test_a_reader_fits_into_a_feasible_set_while_there_are_places_left(
    reads: list[int], version: int, tau: int, place: tuple[int, int]
) -> None:
    per_update, filled = place
    if feasible(reads, version, tau, *place):
        assert readable(reads, version, tau, *place) == (len(reads) < (tau + 1) * per_update - filled)


@given(
    reads=st.lists(st.integers(0, 8), max_size=8),
    version=st.integers(8, 12),
    tau=st.integers(0, 12),
    place=places,
)
def test_the_oldest_reader_of_a_feasible_set_is_admissible(
    reads: list[int], version: int, tau: int, place: tuple[int, int]
) -> None:
    if reads and feasible(reads, version, tau, *place):
        rest = sorted(reads)[1:]

        assert admissible(rest, version, tau, *place)
