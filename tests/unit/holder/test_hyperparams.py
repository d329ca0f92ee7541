"""What travels of a param group, and what becomes of it on the other side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.transport.fields import MAX_HYPERPARAMS, unpack_hyperparams


def weights(count: int = 1) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


class Anything(Optimizer):
    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)


def test_numbers_flags_and_tuples_of_numbers_travel_and_nothing_else() -> None:
    optimizer = Anything(
        weights(),
        lr=torch.tensor(0.5),
        flag=True,
        count=3,
        pair=(0.25, 0.75),
        text="text",
        nothing=None,
        table={"a": 1.0},
        vector=torch.ones(2),
        words=("a", "b"),
        empty=(),
        infinite=float("inf"),
        huge=2**60,
        fused=True,
        foreach=False,
    )

    layout = HyperparamLayout(optimizer)

    assert layout.names == [("lr", "flag", "count", "pair")]
    assert layout.read(optimizer.param_groups) == (0.5, 1.0, 3.0, 0.25, 0.75)


def test_a_schedulers_notes_stay_unless_the_optimizer_has_a_hyper_parameter_of_that_name() -> None:
    optimizer = SGD(weights(), momentum=0.9)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    assert "max_lr" in optimizer.param_groups[0]
    assert HyperparamLayout(optimizer).names == [
        ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    ]
    assert HyperparamLayout(Anything(weights(), lr=1.0, max_lr=2.0)).names == [("lr", "max_lr")]


def test_what_is_assigned_is_what_was_read_in_the_types_that_were_there() -> None:
    source = Anything(weights(), lr=1, flag=True, count=3, pair=(0.25, 0.75))
    target = Anything(weights(), lr=1, flag=True, count=3, pair=(0.25, 0.75))
    layout = HyperparamLayout(source)
    before = layout.read(source.param_groups)
    source.param_groups[0].update(lr=0.5, flag=False, count=4, pair=(0.25, 0.5))

    layout.assign(target.param_groups, layout.read(source.param_groups), before)

    own = target.param_groups[0]
    assert {key: own[key] for key in layout.names[0]} == {"lr": 0.5, "flag": False, "count": 4, "pair": (0.25, 0.5)}
    assert [type(own[key]) for key in layout.names[0]] == [float, bool, int, tuple]


def test_a_value_that_the_worker_has_not_changed_is_left_to_the_optimizer() -> None:
    """Some optimizers adapt a value of their groups with every step; the worker's copy of it stands still."""
    target = Anything(weights(), lr=0.1, adapted=1.0)
    layout = HyperparamLayout(target)
    before = layout.read(target.param_groups)
    target.param_groups[0]["adapted"] = 2.0

    layout.assign(target.param_groups, (0.5, 1.0), before)

    assert (target.param_groups[0]["lr"], target.param_groups[0]["adapted"]) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (0.1, lambda group: group.update(value=0.3)),
        ((0.1, 0.2), lambda group: group.update(value=(0.1, 0.3))),
        ([0.1, 0.2], lambda group: group["value"].__setitem__(1, 0.3)),
        (torch.tensor(0.1, dtype=torch.float64), lambda group: group["value"].fill_(0.3)),
        ((0.1, torch.tensor(0.2, dtype=torch.float64)), lambda group: group["value"][1].fill_(0.3)),
        (0.1, lambda group: group.update(value=torch.tensor(0.3, dtype=torch.float64))),
    ],
    ids=["number", "tuple", "list-in-place", "tensor-in-place", "tuple-of-tensors-in-place", "number-to-tensor"],
)
def test_every_change_of_a_value_is_sent(value: Any, change: Any) -> None:
    optimizer = Anything(weights(), value=value)
    layout = HyperparamLayout(optimizer)
    reader = HyperparamReader(optimizer, layout)
    first = unpack_hyperparams(reader.packed(), layout.count)
    again = unpack_hyperparams(reader.packed(), layout.count)

    change(optimizer.param_groups[0])
    changed = unpack_hyperparams(reader.packed(), layout.count)
    second_change = optimizer.param_groups[0]["value"]
    if isinstance(second_change, torch.Tensor):
        second_change.fill_(0.4)

    assert first == again
    assert changed == (*first[:-1], 0.3)
    if isinstance(second_change, torch.Tensor):
        assert unpack_hyperparams(reader.packed(), layout.count) == (0.4,)


def test_a_param_group_that_comes_later_is_refused() -> None:
    optimizer = SGD(weights(), lr=0.1)
    reader = HyperparamReader(optimizer, HyperparamLayout(optimizer))
    optimizer.add_param_group({"params": weights()})

    with pytest.raises(ValueError, match="SGD has 2 param groups, and had 1 when fit began"):
        reader.packed()


def test_the_digest_tells_optimizers_and_groups_apart() -> None:
    first, second = weights(2)
    optimizers: list[Optimizer] = [
        SGD([first, second]),
        SGD([{"params": [first]}, {"params": [second]}]),
        Adam([first, second]),
        Anything([first, second], pair=(0.1, 0.2)),
        Anything([first, second], pair=(0.1, 0.2, 0.3)),
    ]

    digests = {HyperparamLayout(optimizer).digest() for optimizer in optimizers}

    assert len(digests) == len(optimizers)
    assert HyperparamLayout(SGD([first, second], lr=0.5)).digest() in digests


def test_more_hyper_parameters_than_a_message_may_have_are_refused_at_once() -> None:
    optimizer = Anything(weights(), table=(0.5,) * (MAX_HYPERPARAMS + 1))

    with pytest.raises(ValueError, match=f"Anything has {MAX_HYPERPARAMS + 1} hyperparameters in its 1 param groups"):
        HyperparamLayout(optimizer)


def test_an_optimizer_without_hyper_parameters_sends_none() -> None:
    optimizer = Anything(weights())

    assert HyperparamReader(optimizer, HyperparamLayout(optimizer)).packed() == b""
