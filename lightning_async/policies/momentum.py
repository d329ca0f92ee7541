"""How much momentum the holder uses in place of the user's, since asynchrony adds some of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch

__all__ = [
    "MomentumCorrection",
    "check_has_momentum",
    "check_momentum_correction",
    "corrected_group",
    "corrected_momentum",
    "implicit_momentum",
    "momentum_rule",
]

MomentumCorrection: TypeAlias = float | Literal["auto"] | None

# In place of 0: as good as none, and an optimizer still keeps the buffer that its checkpoint needs elsewhere.
_LEAST = 1e-12


def implicit_momentum(workers: int, gradients_per_update: int) -> float:
    r"""The momentum that asynchrony itself adds: :math:`\mu = 1 - K / N`, 0 where :math:`K \ge N`.

    N workers that apply one gradient at a time move as if there were momentum of :math:`1 - 1 / N`: theorem of
    "Asynchrony begets momentum" (`arXiv:1605.09774 <https://arxiv.org/abs/1605.09774>`_). With K gradients in an update
    there are N / K updates to a round of all workers.

    Examples:
        >>> implicit_momentum(4, 1), implicit_momentum(4, 2), implicit_momentum(4, 4)
        (0.75, 0.5, 0.0)
    """
    return max(0.0, 1.0 - gradients_per_update / workers)


def corrected_momentum(beta: float, workers: int, gradients_per_update: int) -> float:
    r"""The momentum that with the implicit one gives the user's: :math:`\max(0, (\beta - \mu) / (1 - \mu))`.

    The response to a gradient then dies away as it does with momentum :math:`\beta` alone to first order:
    :math:`(1 - \beta') (1 - \mu) = 1 - \beta`.

    Args:
        beta: the user's momentum, in [0, 1).
        workers: number of ranks, N.
        gradients_per_update: gradients that make an update, K.

    Examples:
        >>> [round(corrected_momentum(0.9, 4, k), 3) for k in (1, 2, 4)], corrected_momentum(0.5, 4, 1)
        ([0.6, 0.8, 0.9], 0.0)
    """
    implicit = implicit_momentum(workers, gradients_per_update)
    return max(0.0, (beta - implicit) / (1.0 - implicit)) if implicit else beta


def check_momentum_correction(value: object) -> None:
    """Refuses what is no correction.

    Raises:
        ValueError: if it is none; the message says what is.
    """
    if value is None or value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(
            'momentum_correction must be "auto", a number between 0 and 1 that the momentum is multiplied by, or None, '
            f"not {value!r}."
        )


def momentum_rule(
    correction: MomentumCorrection, workers: int, gradients_per_update: int
) -> Callable[[float], float] | None:
    """What becomes of a momentum; None if it stays.

    Examples:
        >>> momentum_rule(0.5, 4, 1)(0.9), momentum_rule(None, 4, 1)
        (0.45, None)
    """
    if correction is None:
        return None
    if correction == "auto":
        return lambda beta: corrected_momentum(beta, workers, gradients_per_update)
    factor = float(correction)
    return lambda beta: factor * beta


def corrected_group(group: Mapping[str, Any], rule: Callable[[float], float]) -> dict[str, Any]:
    """What a rule changes in a param group: ``betas``, ``momentum``, or nothing.

    Examples:
        >>> corrected_group({"lr": 1.0, "betas": (0.5, 0.999)}, lambda beta: beta / 2)
        {'betas': (0.25, 0.999)}
        >>> corrected_group({"momentum": 0.5}, lambda beta: beta / 2), corrected_group({"lr": 1.0}, lambda beta: 0.0)
        ({'momentum': 0.25}, {})
    """
    if "betas" in group:
        first, *others = group["betas"]
        return {"betas": (rule(first), *others)}
    momentum = group.get("momentum")
    return {"momentum": max(_LEAST, rule(momentum))} if momentum else {}


def check_has_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that has no momentum to correct.

    Raises:
        ValueError: if it has none.

    Examples:
        >>> check_has_momentum(torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: momentum_correction changes beta1 or momentum, and Adagrad has neither. Leave it out, or ...
    """
    for group in optimizer.param_groups:
        betas = group.get("betas")
        if betas or group.get("momentum"):
            return
    name, without = type(optimizer).__name__, "neither"
    if any("momentum" in group for group in optimizer.param_groups):
        without = "momentum 0"
    raise ValueError(
        f"momentum_correction changes beta1 or momentum, and {name} has {without}. Leave it out, or "
        "return Adam, AMSGrad or SGD(momentum=...) from configure_optimizers"
    )
