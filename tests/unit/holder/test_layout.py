"""The flat buffers: every parameter has a place of its own, and processes with other parameters notice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.holder.layout import FlatLayout

shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)
optimizers = st.lists(shapes, min_size=1, max_size=3)


def build(owned: list[list[tuple[int, ...]]], dtype: torch.dtype = torch.float32) -> FlatLayout:
    return FlatLayout([[torch.zeros(shape, dtype=dtype) for shape in shapes] for shapes in owned])


@given(owned=optimizers)
def test_the_views_tile_the_buffer_in_order(owned: list[list[tuple[int, ...]]]) -> None:
    layout = build(owned)
    flat = layout.buffer()

    count = 0
    for index, shapes in enumerate(owned):
        views = layout.views(flat, index)
        assert [tuple(view.shape) for view in views] == shapes
        for view in views:
            view.copy_(torch.arange(count, count + view.numel(), dtype=flat.dtype).view(view.shape))
            count += view.numel()

    assert flat.tolist() == list(range(layout.numel))
    assert count == layout.numel


@given(owned=optimizers)
def test_the_segments_are_the_payloads_of_the_optimizers(owned: list[list[tuple[int, ...]]]) -> None:
    layout = build(owned)
    flat = torch.arange(layout.numel, dtype=torch.float32)

    segments = [layout.segment(flat, index) for index in range(len(owned))]

    assert torch.cat(segments).equal(flat)
    assert [segment.nbytes for segment in segments] == [layout.segment_bytes(index) for index in range(len(owned))]
    for index, segment in enumerate(segments):
        assert segment.equal(torch.cat([view.reshape(-1) for view in layout.views(flat, index)]))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_the_master_copy_has_at_least_single_precision(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    layout = FlatLayout([[torch.zeros(2, dtype=dtype) for dtype in dtypes]])

    assert layout.dtype is layout.buffer().dtype is expected


@given(mine=optimizers, theirs=optimizers)
def test_the_fingerprint_tells_models_apart(
    mine: list[list[tuple[int, ...]]], theirs: list[list[tuple[int, ...]]]
) -> None:
    assert (build(mine).fingerprint() == build(theirs).fingerprint()) is (mine == theirs)
    assert build(mine).fingerprint() != build(mine, torch.float64).fingerprint()


def test_what_cannot_be_laid_out_is_refused_with_the_reason() -> None:
    weight = torch.zeros(2)
    with pytest.raises(ValueError, match="no parameter"):
        FlatLayout([[], []])
    with pytest.raises(ValueError, match="share a parameter"):
        FlatLayout([[weight], [weight]])
    with pytest.raises(ValueError, match="real floating-point"):
        FlatLayout([[weight, torch.zeros(2, dtype=torch.int64)]])
    with pytest.raises(ValueError, match="real floating-point"):
        FlatLayout([[torch.zeros(2, dtype=torch.complex64)]])
