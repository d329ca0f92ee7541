"""An optimizer over the pieces of a shard, in the place of the module's over its parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_async.exchange.child_process import check_policy_can_travel
from lightning_async.holder.held_state import HeldState
from lightning_async.holder.layout import exchanged, exchanged_parameters
from lightning_async.holder.rebuild import assemble, is_amsgrad
from lightning_async.policies.base import StalenessPolicy, overrides
from lightning_async.shards.plan import ShardPlan

__all__ = [
    "attributes_of_pieces",
    "check_can_be_cut",
    "check_policy_can_be_cut",
    "cuts_parameters",
    "optimizer_of_pieces",
]


def cuts_parameters(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's update of a part of a parameter gives the same bits as its update of the whole.

    Examples:
        >>> weights = [nn.Parameter(torch.ones(1))]
        >>> cuts_parameters(torch.optim.Adam(weights, amsgrad=True)), cuts_parameters(torch.optim.Adafactor(weights))
        (True, False)
    """
    return is_amsgrad(optimizer)


def check_can_be_cut(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuses optimizers that need all parameters in one place.

    Args:
        optimizers: the module's.

    Raises:
        ValueError: if they are refused; the message says what can be had.
    """
    if len(optimizers) > 1:
        raise ValueError(
            f"holder_shards takes one optimizer and there are {len(optimizers)}: their parameters would be in "
            "different shards, which follow one order of gradients. Leave holder_shards out"
        )
    for optimizer in optimizers:
        kind = type(optimizer)
        if not is_amsgrad(optimizer) and not kind.__module__.startswith("torch.optim."):
            raise ValueError(
                f"holder_shards gives each shard some of the parameters, and what {kind.__name__} does with one may "
                "depend on the others. Take AMSGrad or an optimizer of torch.optim, or leave holder_shards out"
            )


def check_policy_can_be_cut(policy: StalenessPolicy) -> None:
    """Refuses a staleness policy that cannot work on pieces of parameters, in several processes.

    Args:
        policy: what is done with a gradient because of its age.

    Raises:
        ValueError: if it is refused; the message says what can be had.
    """
    kind = type(policy)
    if kind.__module__.startswith("lightning_async."):
        return
    if any(overrides(policy, name) for name in ("after_step", "look_ahead")):
        raise ValueError(
            f"holder_shards shows a staleness policy pieces of parameters, and {kind.__name__} overrides after_step or "
            "look_ahead, which may need whole ones. Leave holder_shards out"
        )
    check_policy_can_travel(policy, "holder_shards", "leave holder_shards out")


def optimizer_of_pieces(template: torch.optim.Optimizer, plan: ShardPlan, shard: int) -> torch.optim.Optimizer:
    """The template's class and param groups over a shard's pieces, which have shapes and no memory.

    Examples:
        >>> weights = [nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(8))]
        >>> plan = ShardPlan(shapes=((40,), (8,)), borders=(0, 32, 48))
        >>> optimizer = optimizer_of_pieces(torch.optim.Adam(weights, lr=0.5), plan, 1)
        >>> optimizer.param_groups[0]["lr"], [tuple(piece.shape) for piece in optimizer.param_groups[0]["params"]]
        (0.5, [(8,), (8,)])
    """
    return assemble(type(template), attributes_of_pieces(template, plan, shard))


def attributes_of_pieces(template: torch.optim.Optimizer, plan: ShardPlan, shard: int) -> dict[str, Any]:
    """What `optimizer_of_pieces` is assembled from, here or in another process."""
    owned = exchanged_parameters(template)
    pieces = plan.pieces(shard)
    own = [
        nn.Parameter(
            torch.empty(piece.shape, dtype=owned[piece.parameter].dtype, device="meta"),
            owned[piece.parameter].requires_grad,
        )
        for piece in pieces
    ]
    groups, first = [], 0
    for group in template.param_groups:
        after = first + sum(map(exchanged, group["params"]))
        settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        members = [mine for mine, piece in zip(own, pieces, strict=True) if first <= piece.parameter < after]
        groups.append({"params": members, **settings})
        first = after
    # What the constructor has made, such as Adagrad's sums.
    kept: Any = template.state
    by_place = {} if isinstance(kept, HeldState) else {i: kept[p] for i, p in enumerate(owned) if p in kept}
    state: dict[Any, Any] = defaultdict(dict)
    for place, entry in plan.cut_state(by_place, shard).items():
        state[own[place]] = copy.deepcopy(entry)
    return {"defaults": copy.deepcopy(template.defaults), "state": state, "param_groups": groups}
