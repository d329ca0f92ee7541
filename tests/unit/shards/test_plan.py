"""A vector is cut into parts, and what lies in them is joined again, without a bit lost or moved."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_async import AMSGrad
from lightning_async.shards.plan import ShardPlan, plan_shards
from lightning_async.shards.template import (
    check_can_be_cut,
    cuts_parameters,
    optimizer_of_pieces,
)
from tests.elsewhere import Signs

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=8)


@given(shapes=SHAPES, shards=st.integers(1, 5), cuts=st.booleans())
def test_the_parts_make_up_the_vector_and_none_is_empty(shapes: list[tuple[int, ...]], shards: int, cuts: bool) -> None:
    plan = plan_shards(shapes, shards, cuts)

    numel = sum(map(math.prod, shapes))
    assert plan.numel == numel and plan.borders[0] == 0 and 1 <= plan.count <= shards
    assert numel == 0 or all(plan.part(shard).start < plan.part(shard).stop for shard in range(plan.count))
    pieces = [piece for shard in range(plan.count) for piece in plan.pieces(shard)]
    assert [piece.parameter for piece in pieces] == sorted(piece.parameter for piece in pieces)
    for place, shape in enumerate(shapes):
        mine = [piece for piece in pieces if piece.parameter == place]
        assert sum(piece.stop - piece.start for piece in mine) == math.prod(shape)
        assert all(piece.start % 16 == 0 for piece in mine)
        assert len(mine) == 1 or cuts


@given(shapes=SHAPES, shards=st.integers(1, 5), cuts=st.booleans(), absent=st.integers(0, 7))
def test_what_is_cut_and_joined_is_what_it_was(
    shapes: list[tuple[int, ...]], shards: int, cuts: bool, absent: int
) -> None:
    plan = plan_shards(shapes, shards, cuts)
    tensors = [None if place == absent else torch.randn(shape) for place, shape in enumerate(shapes)]
    state = {
        place: {"step": torch.tensor(float(place)), "exp_avg": torch.randn(shape)}
        for place, shape in enumerate(shapes)
        if place != absent
    }

    joined = plan.join_tensors([plan.cut_tensors(tensors, shard) for shard in range(plan.count)])
    joined_state = plan.join_state([plan.cut_state(state, shard) for shard in range(plan.count)])

    for before, after in zip(tensors, joined, strict=True):
        assert (before is None) == (after is None)
        assert before is None or after is None or (torch.equal(before, after) and before.shape == after.shape)
    assert joined_state.keys() == state.keys()
    for place, entry in state.items():
        assert all(torch.equal(value, joined_state[place][key]) for key, value in entry.items())


def test_parts_are_nearly_equal_where_parameters_may_be_cut() -> None:
    plan = plan_shards([(1000, 1000), (10,)], 4, cuts_parameters=True)

    sizes = [plan.part(shard).stop - plan.part(shard).start for shard in range(4)]
    assert max(sizes) - min(sizes) <= 32


@pytest.mark.parametrize("decoupled", [False, True])
def test_amsgrad_steps_pieces_to_the_bits_of_the_whole(decoupled: bool) -> None:
    torch.manual_seed(2)
    whole = nn.Parameter(torch.randn(7, 101))
    plan = plan_shards([whole.shape], 3, cuts_parameters=True)
    pieces = [
        nn.Parameter(piece.clone())
        for shard in range(3)
        for piece in plan.cut_tensors([whole], shard)
        if piece is not None
    ]
    settings = {"lr": 0.03, "weight_decay": 0.1, "decoupled_weight_decay": decoupled, "fused": True}
    optimizers = [AMSGrad([whole], **settings), *(AMSGrad([piece], **settings) for piece in pieces)]

    for _ in range(20):
        whole.grad = torch.randn(whole.shape)
        for shard, piece in enumerate(pieces):
            (piece.grad,) = plan.cut_tensors([whole.grad], shard)
        for optimizer in optimizers:
            optimizer.step()

    (joined,) = plan.join_tensors([[piece.detach()] for piece in pieces])
    assert joined is not None and torch.equal(joined, whole)


def test_a_shard_has_the_settings_of_each_group() -> None:
    groups = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.SGD([{"params": [groups[0]], "lr": 0.5}, {"params": [groups[1]], "lr": 0.25}], momentum=0.5)

    shard = optimizer_of_pieces(optimizer, ShardPlan(((4,), (4,)), (0, 4, 8)), 1)

    assert [(group["lr"], len(group["params"])) for group in shard.param_groups] == [(0.5, 0), (0.25, 1)]


def test_what_a_constructor_has_made_goes_with_its_pieces() -> None:
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6))]
    optimizer = torch.optim.Adagrad(weights, initial_accumulator_value=0.5)

    shard = optimizer_of_pieces(optimizer, ShardPlan(((4,), (6,)), (0, 4, 10)), 1)

    (state,) = shard.state.values()
    assert state["sum"].tolist() == [0.5] * 6
    assert not cuts_parameters(optimizer)


def test_what_needs_all_parameters_in_one_place_is_refused() -> None:
    weights = [nn.Parameter(torch.ones(4))]
    with pytest.raises(ValueError, match="what Signs does with one may depend on the others"):
        check_can_be_cut([Signs(weights, lr=0.1)])
    with pytest.raises(ValueError, match="takes one optimizer and there are 2"):
        check_can_be_cut([torch.optim.SGD(weights, lr=0.1)] * 2)
