"""How many batches make a step, as the steps of user code show it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.data.rhythm import Rhythm, usual_group


def after(steps: list[bool]) -> Rhythm:
    """A rhythm that has seen batches, each with a step or without."""
    rhythm = Rhythm()
    for made in steps:
        rhythm.begin_batch()
        if made:
            rhythm.step()
    return rhythm


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([], False),
        ([True], False),
        ([False], False),
        ([True, False], False),
        ([True, True], True),
        ([False, True], True),
    ],
)
def test_one_step_in_the_first_batch_shows_nothing(steps: list[bool], shown: bool) -> None:
    assert after(steps).is_shown == shown


@given(every=st.integers(1, 8), phase=st.integers(0, 7), batches=st.integers(0, 40))
def test_what_is_shown_is_how_often_user_code_steps_or_a_part_of_it_from_the_middle(
    every: int, phase: int, batches: int
) -> None:
    steps = [(index + phase) % every == every - 1 for index in range(batches)]
    rhythm = after(steps)

    assert rhythm.counted == sum(steps)
    first = every - phase % every
    if batches >= first + every:
        assert rhythm.is_shown
        assert usual_group([rhythm.seen]) == every
    assert rhythm.open_batches == ((batches - first) % every if batches >= first else batches)
