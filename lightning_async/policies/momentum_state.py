"""What SGD, Adam and AMSGrad keep of past gradients, and how their steps follow from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Family", "GroupState", "adam_denominators", "adam_scales", "family_of", "group_states", "refuse_optimizer"]

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


def adam_denominators(chosen: GroupState) -> list[Tensor]:
    r"""Of each parameter :math:`\sqrt{\hat v} / c_t + \epsilon`, what Adam's or AMSGrad's last step divided by."""
    group = chosen.group
    second = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    denominators: list[Tensor] = [*torch._foreach_sqrt([state[second] for state in chosen.states])]
    if group.get("bias_correction", True):
        roots: Any = [_correction(group["betas"][1], state["step"]) ** 0.5 for state in chosen.states]
        torch._foreach_div_(denominators, roots)
    torch._foreach_add_(denominators, group["eps"])
    return denominators


def adam_scales(chosen: GroupState, factor: float) -> Any:
    r"""Of each parameter ``factor`` times its last step size, :math:`\alpha / (1 - \beta_1^t)`.

    These are numbers, or one-element tensors where the holder is on a GPU: reading them would wait for it.
    """
    factor *= chosen.group["lr"]
    if not chosen.group.get("bias_correction", True):
        return [factor] * len(chosen.states)
    return [factor / _correction(chosen.group["betas"][0], state["step"]) for state in chosen.states]


def _correction(beta: float, step: Any) -> Any:
    """The bias correction 1 - beta^t."""
    if isinstance(step, Tensor) and step.is_cpu:
        step = step.item()
    return 1.0 - beta**step
