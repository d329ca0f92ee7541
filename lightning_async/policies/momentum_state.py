"""What SGD, Adam and AMSGrad keep of past gradients, and how their steps follow from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Family", "GroupState", "family_of", "group_states", "move_along_adam", "refuse_optimizer"]

Family: TypeAlias = Literal["sgd", "adam"]

_FAMILIES: tuple[tuple[type[torch.optim.Optimizer], Family], ...] = (
    (torch.optim.SGD, "sgd"),
    (torch.optim.Adam, "adam"),
    (torch.optim.AdamW, "adam"),
)


def family_of(optimizer: torch.optim.Optimizer) -> Family | None:
    """Whether an optimizer steps as SGD does, or as Adam does; None if neither, or without momentum.

    Examples:
        >>> weights = [torch.nn.Parameter(torch.ones(1))]
        >>> family_of(torch.optim.AdamW(weights)), family_of(torch.optim.SGD(weights, momentum=0.9))
        ('adam', 'sgd')
        >>> family_of(torch.optim.SGD(weights)), family_of(torch.optim.RMSprop(weights, momentum=0.9))
        (None, None)
    """
    step = inspect.unwrap(type(optimizer).step)
    found = next((family for kind, family in _FAMILIES if inspect.unwrap(kind.step) is step), None)
    if found == "sgd" and not all(group["momentum"] for group in optimizer.param_groups):
        return None
    return found


def refuse_optimizer(policy: str, purpose: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer whose momentum is not known.

    Args:
        policy: name of the policy's class.
        purpose: what it does, with "momentum" as the object.
        optimizer: the module's.

    Raises:
        ValueError: if it is of no `Family`.
    """
    if family_of(optimizer) is None:
        name = type(optimizer).__name__
        without = " without momentum" if isinstance(optimizer, torch.optim.SGD) else ""
        raise ValueError(
            f"{policy} {purpose} momentum of AMSGrad, Adam, AdamW or SGD(momentum=...), and the optimizer is "
            f'{name}{without}. Return one of those from configure_optimizers, or take staleness_policy="plain"'
        )


class GroupState(NamedTuple):
    """The parameters of a param group that have a state, and what belongs to each.

    Args:
        group: the param group.
        parameters: its parameters that have a state.
        states: the state of each.
        others: of each what the caller keeps.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    states: list[Mapping[str, Any]]
    others: list[Tensor]


def group_states(optimizer: torch.optim.Optimizer, others: Sequence[Tensor | None], key: str) -> list[GroupState]:
    """For each param group its parameters that have both something in ``others`` and a state.

    Args:
        optimizer: the holder's.
        others: one for each parameter, over all groups, or None.
        key: what a state must have.
    """
    found, start = [], 0
    for group in optimizer.param_groups:
        own = group["params"]
        chosen = [
            (parameter, optimizer.state[parameter], other)
            for parameter, other in zip(own, others[start : start + len(own)], strict=True)
            if other is not None and optimizer.state.get(parameter, {}).get(key) is not None
        ]
        start += len(own)
        if chosen:
            parameters, states, kept = zip(*chosen, strict=True)
            found.append(GroupState(group, [*parameters], [*states], [*kept]))
    return found


def move_along_adam(chosen: GroupState, targets: list[Tensor], directions: list[Tensor], factor: float) -> None:
    r"""Moves tensors, in place, as Adam's or AMSGrad's last step has moved the parameters along its momentum.

    With that step's bias corrections, :math:`x \leftarrow x - f\, \alpha_t\, d / (\sqrt{\hat v} / c_t + \epsilon)`.

    Args:
        chosen: the parameters and their states.
        targets: for each parameter what is moved, :math:`x`.
        directions: for each parameter the direction, :math:`d`.
        factor: :math:`f`.
    """
    group, states = chosen.group, chosen.states
    second, eps, factor = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq", group["eps"], factor * group["lr"]
    roots = [*torch._foreach_sqrt([state[second] for state in states])]
    steps = [state["step"] for state in states]
    if not group.get("bias_correction", True):
        torch._foreach_add_(roots, eps)
        torch._foreach_addcdiv_(targets, directions, roots, value=-factor)
    elif _can_read(steps):
        counts = [float(step) for step in steps]
        of = {count: _corrections(group["betas"], count) for count in {*counts}}
        # The fraction times c_t in both its parts: three passes instead of six.
        torch._foreach_add_(roots, [eps * of[count][1] for count in counts])
        scales = [-factor * of[count][1] / of[count][0] for count in counts]
        torch._foreach_addcdiv_(targets, directions, roots, scales)
    else:
        each = [_corrections(group["betas"], step) for step in steps]
        torch._foreach_div_(roots, [root for _, root in each])
        torch._foreach_add_(roots, eps)
        moves = [*torch._foreach_div(directions, roots)]
        torch._foreach_mul_(moves, [factor / first for first, _ in each])
        torch._foreach_sub_(targets, moves)


def _can_read(steps: Sequence[Any]) -> bool:
    """Whether the counts of steps are numbers here; on a GPU reading them would wait for it."""
    return all(not isinstance(step, Tensor) or step.is_cpu for step in steps)


def _corrections(betas: Sequence[float], step: Any) -> tuple[Any, Any]:
    """The bias correction of the first moment, and the root of that of the second."""
    return 1.0 - betas[0] ** step, (1.0 - betas[1] ** step) ** 0.5
