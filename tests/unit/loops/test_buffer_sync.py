"""Rules for buffers at a meeting: what counts, what may be named, what is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_async.loops.buffer_sync import BufferSync, check_averaged, check_ignored, counted_as_ddp, share_module
from lightning_async.loops.tensor_sync import _digest


@given(
    rate=st.integers(1, 1000),
    batches=st.lists(st.integers(0, 500), min_size=2, max_size=8).filter(any),
    as_ddp=st.integers(0, 500),
)
def test_what_advances_alike_with_each_batch_counts_ddps_batches(rate: int, batches: list[int], as_ddp: int) -> None:
    assert counted_as_ddp([rate * n for n in batches], batches, as_ddp) == rate * as_ddp


@given(
    batches=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    off=st.integers(1, 20),
)
def test_a_pointer_or_table_that_does_not_follow_the_batches_is_no_counter(batches: list[int], off: int) -> None:
    advanced = [*batches[:-1], batches[-1] + off]

    assert counted_as_ddp(advanced, batches, 10) is None


def test_a_float_counter_may_be_rounded_in_each_addition() -> None:
    tenth = torch.zeros(())
    advanced = []
    for batches in (37, 5):
        tenth = torch.full((), 2.0)
        for _ in range(batches):
            tenth += 0.1
        advanced.append(float(tenth.double() - 2.0))

    counted = counted_as_ddp(advanced, [37, 5], 21, rounding=torch.finfo(torch.float32).eps * 6)

    assert counted == pytest.approx(2.1, abs=1e-5)


def test_a_counter_without_a_batch_of_any_rank_is_left() -> None:
    assert counted_as_ddp([3, 3], [0, 0], 0) is None


class Alone:
    """A gather of one rank."""

    def __call__(self, mine: Any) -> list[Any]:
        return [mine]


@pytest.mark.parametrize("names", ["mean", ["missing"], ["count"], 3])
def test_a_choice_of_averaged_buffers_that_means_nothing_is_refused(names: Any) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_buffer("mean", torch.zeros(2))
    module[0].register_buffer("count", torch.zeros((), dtype=torch.int64))
    check_averaged(module)
    module[0].averaged_buffers = names

    with pytest.raises(ValueError, match=r"averaged_buffers of (0 names|a Linear must be a list)"):
        check_averaged(module)


def test_what_ddp_ignores_and_an_optimizer_has_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module._ddp_params_and_buffers_to_ignore = ["1.weight"]  # type: ignore[assignment]
    check_ignored(module, [torch.optim.SGD([*module[0].parameters(), module[1].bias])])

    with pytest.raises(ValueError, match=r"^1\.weight: named in _ddp_params_and_buffers_to_ignore"):
        check_ignored(module, [torch.optim.SGD(module.parameters())])


def test_ranks_with_unlike_parameters_are_told_which() -> None:
    others = [{"weight": "(3, 2) torch.float32", "bias": "(3,) torch.float32"}, {}]

    with pytest.raises(ValueError, match=r"weight \(rank 0: \(2, 2\) torch\.float32, rank 1: \(3, 2\)"):
        share_module(nn.Linear(2, 2), lambda mine: [mine, others])


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (torch.tensor([0, 2, 1]), torch.tensor([2, 1, 0])),
        (torch.tensor([5, 0]), torch.tensor([0, 3])),
        (torch.tensor([True, False]), torch.tensor([False, True])),
        (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])),
        (torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])),
        (torch.arange(3_000_000), torch.arange(3_000_000).roll(1 << 20)),
    ],
)
def test_tensors_with_the_same_values_in_another_order_are_told_apart(mine: Any, theirs: Any) -> None:
    assert _digest(mine).equal(_digest(mine.clone()))
    assert not _digest(mine).equal(_digest(theirs))


def test_a_buffer_that_is_replaced_in_a_segment_is_followed_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.loops.buffer_sync.take_unlike_from_rank_0", lambda tensors: None)
    module = nn.Module()
    module.register_buffer("steps", torch.tensor(10))
    module.register_buffer("none", None)
    sync = BufferSync(module, Alone(), rank=0)
    sync.begin_segment()

    module.steps = module.steps + 7
    sync.meet(batches=7, batches_as_ddp=4)

    assert module.steps.item() == 14
