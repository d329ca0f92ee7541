"""The mean of gradients is that of their samples, whoever computed them and in whatever pieces."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_async.holder.gradient_mean import GradientMean

SIZES = (3, 2, 4)


def make_mean() -> GradientMean:
    buffer = torch.zeros(sum(SIZES))
    return GradientMean(buffer, buffer.split(SIZES))


@st.composite
def pushes(draw: st.DrawFn) -> list[tuple[list[Tensor | None], int]]:
    """Gradients of three parameters, some of which take no part, and their samples."""
    made: list[tuple[list[Tensor | None], int]] = []
    for seed in range(draw(st.integers(1, 5))):
        generator = torch.Generator().manual_seed(seed)
        present = draw(st.lists(st.booleans(), min_size=3, max_size=3) | st.just([True] * 3))
        gradients = [
            torch.randn(size, generator=generator) if there else None
            for size, there in zip(SIZES, present, strict=True)
        ]
        made.append((gradients, draw(st.integers(1, 64))))
    return made


def expected(made: list[tuple[list[Tensor | None], int]]) -> list[Tensor | None]:
    """By the formula, in double precision."""
    samples = sum(weight for _, weight in made)
    means: list[Tensor | None] = []
    for place, size in enumerate(SIZES):
        own = [(gradients[place], weight) for gradients, weight in made]
        total = sum((one.double() * weight for one, weight in own if one is not None), torch.zeros(size).double())
        means.append(None if all(one is None for one, _ in own) else (total / samples).float())
    return means


def assert_close(found: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(first=pushes(), second=pushes(), flat=st.booleans())
def test_the_mean_is_over_all_samples_each_time_anew(
    first: list[tuple[list[Tensor | None], int]], second: list[tuple[list[Tensor | None], int]], flat: bool
) -> None:
    mean = make_mean()
    for made in (first, second):
        for gradients, samples in made:
            whole = flat and all(one is not None for one in gradients)
            mean.add(gradients, samples, torch.cat([*gradients]) if whole else None)  # type: ignore[arg-type]

        assert_close(mean.take(), expected(made))


@settings(deadline=None)
@given(made=pushes(), cut=st.integers(0, 5))
def test_what_was_gathered_goes_on_elsewhere(made: list[tuple[list[Tensor | None], int]], cut: int) -> None:
    mean, other = make_mean(), make_mean()
    for gradients, samples in made[:cut]:
        mean.add(gradients, samples)
    other.load(mean.gathered(len(made[:cut])))
    for gradients, samples in made[cut:]:
        other.add(gradients, samples)

    assert_close(other.take(), expected(made))


def test_a_gradient_may_be_overwritten_once_it_is_added() -> None:
    mean, gradient = make_mean(), torch.ones(sum(SIZES))
    mean.add(list(gradient.split(SIZES)), 1, gradient)
    gradient.fill_(9.0)

    assert_close(mean.take(), [torch.ones(size) for size in SIZES])


def test_unknown_numbers_of_samples_count_alike() -> None:
    mean = make_mean()
    for value in (1.0, 3.0):
        mean.add([torch.full((size,), value) for size in SIZES], samples=0)

    assert_close(mean.take(), [torch.full((size,), 2.0) for size in SIZES])
