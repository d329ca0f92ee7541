"""NaN and infinity are found in a gradient wherever they are, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.holder.finite import all_finite, is_finite

values = st.lists(st.floats(width=32), min_size=1, max_size=30)


@given(values)
def test_it_is_what_looking_at_each_value_says(numbers: list[float]) -> None:
    tensor = torch.tensor(numbers)

    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 44_425, 20_000])
@pytest.mark.parametrize("size", [1e-30, 1.0, 3e38])
def test_one_value_of_many_is_found_whatever_the_others_are(spoiled: float, at: int, size: float) -> None:
    gradient = torch.full((44_426,), size)
    assert is_finite(gradient)

    gradient[at] = spoiled

    assert not is_finite(gradient)


def test_what_lies_in_the_place_of_a_parameter_without_a_gradient_does_not_count() -> None:
    flat = torch.tensor([1.0, torch.nan, 2.0])
    parts = [flat[:1], flat[1:2], flat[2:]]

    assert all_finite(flat, parts, [True, False, True])
    assert not all_finite(flat, parts, [True, True, True])
    assert not all_finite(flat, parts, [False, True, False])
