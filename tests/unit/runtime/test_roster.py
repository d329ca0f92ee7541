"""Who is in a run: a rank leaves once, comes back as another worker, and rank 0 and the last few stay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.runtime.roster import Resilience, Roster, is_out_of_memory


@given(
    ranks=st.integers(1, 5),
    least=st.integers(1, 4),
    changes=st.lists(st.tuples(st.sampled_from(["remove", "come back", "new"]), st.integers(0, 7)), max_size=30),
)
def test_what_is_in_the_run_is_what_came_less_what_left(ranks: int, least: int, changes: list[tuple[str, int]]) -> None:
    roster = Roster(range(ranks), min_ranks=least)
    there, incarnations, generation = set(range(ranks)), dict.fromkeys(range(ranks), 0), 0

    for change, rank in changes:
        if change == "remove":
            may_go = rank != 0 and rank in there and len(there) > least
            assert roster.can_lose(rank) == may_go
            assert roster.remove(rank, "killed") == may_go
            there -= {rank} if may_go else set()
            generation += may_go
        elif change == "new":
            new, incarnation = roster.next_rank()
            assert (new, incarnation) == (max(incarnations) + 1, 0)
            incarnations[new] = 0
            roster.add(new)
            there.add(new)
            generation += 1
        elif rank in incarnations and rank not in there:
            incarnations[rank] += 1
            assert roster.next_incarnation(rank) == incarnations[rank]
            roster.add(rank)
            there.add(rank)
            generation += 1
        assert roster.living == tuple(sorted(there))
        assert roster.generation == generation
        assert all((rank in roster) == (rank in there) for rank in range(9))


def test_who_was_lost_and_why_stays_known() -> None:
    roster = Roster(range(4))

    roster.remove(2, "killed")
    roster.remove(2, "killed again")
    roster.add(2)
    roster.remove(2, "lost")

    assert roster.lost == [(2, "killed"), (2, "lost")]


def test_a_rank_that_is_in_the_run_does_not_come_in_again() -> None:
    with pytest.raises(ValueError, match="rank 1 is in the run"):
        Roster(range(2)).add(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_worker_failure": "ignore"}, 'on_worker_failure must be "continue" or "stop", not \'ignore\''),
        ({"min_ranks": 0}, "min_ranks must be an int of at least 1, not 0"),
        ({"min_ranks": True}, "min_ranks must be an int of at least 1, not True"),
        ({"max_restarts": -1}, "max_restarts must be an int of at least 0, not -1"),
        ({"max_restarts": 1.5}, "max_restarts must be an int of at least 0, not 1.5"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resilience(**arguments)


@pytest.mark.parametrize(
    ("reason", "is_memory"),
    [
        ("MemoryError: out of memory", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("out of memory", True),
        ("ValueError: out of memory", False),
        ("its process was killed by SIGKILL", False),
    ],
)
def test_out_of_memory_is_told_from_a_bug(reason: str, is_memory: bool) -> None:
    assert is_out_of_memory(reason) is is_memory
