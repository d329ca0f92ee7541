"""The dial between DDP and the paper's method, and what "auto" makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.momentum import momentum_rule
from lightning_async.policies.registry import describe_policy, make_policy

__all__ = ["Dial", "GradientsPerUpdate", "policy_and_momentum"]

# The strategy's argument `gradients_per_update`.
GradientsPerUpdate: TypeAlias = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Dial:
    """How many gradients make an update, and what is done with their age, as the user has asked.

    Args:
        gradients_per_update: a number, or ``"auto"``.
        staleness_policy: a policy, a name, or None for ``"plain"``, or ``"from_ddp"`` where the number is ``"auto"``.

    Raises:
        ValueError: if the number is none.

    Examples:
        >>> Dial("auto", None).gradients(4), Dial("auto", None).policy
        (2, 'from_ddp')
        >>> Dial(1, None).gradients(4), Dial(1, None).policy
        (1, 'plain')
    """

    gradients_per_update: GradientsPerUpdate
    staleness_policy: str | StalenessPolicy | None

    def __post_init__(self) -> None:
        count: object = self.gradients_per_update
        if count != "auto" and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f'gradients_per_update must be an int of at least 1 or "auto", not {count!r}.')

    def gradients(self, workers: int) -> int:
        """K for a number of ranks; ``"auto"`` is half of them (why: docs/results.md)."""
        if self.gradients_per_update == "auto":
            return -(-workers // 2)
        return self.gradients_per_update

    @property
    def policy(self) -> str | StalenessPolicy:
        """What is done with a gradient because of its age."""
        if self.staleness_policy is not None:
            return self.staleness_policy
        return "from_ddp" if self.gradients_per_update == "auto" else "plain"

    @property
    def requested(self) -> dict[str, str]:
        """The arguments that were left to the run, by name."""
        return {"gradients_per_update": "auto"} if self.gradients_per_update == "auto" else {}

    def notice(self, workers: int, gradients: int) -> str | None:
        """What "auto" has chosen and why, in a line; None if nothing was left to it, or there is nothing to choose.

        Args:
            workers: number of ranks, N.
            gradients: that make an update, K: one with several optimizers.

        Examples:
            >>> print(Dial("auto", None).notice(4, 2))
            gradients_per_update="auto": 2 gradients an update for 4 ranks; staleness_policy=from_ddp, so that \
learning rate and momentum can be those of DDP.
        """
        if self.gradients_per_update != "auto" or workers == 1:
            return None
        number = f"{gradients} gradient{'s' if gradients > 1 else ''}"
        said = f'gradients_per_update="auto": {number} an update for {workers} ranks'
        policy = f"staleness_policy={describe_policy(self.policy)}"
        if self.staleness_policy is not None:
            return f"{said}; {policy}."
        return f"{said}; {policy}, so that learning rate and momentum can be those of DDP."


def policy_and_momentum(
    options: ExchangeOptions, optimizers: Sequence[torch.optim.Optimizer], workers: int
) -> tuple[StalenessPolicy, Callable[[float], float] | None]:
    """What a holder does with ages, and what becomes of its momentum, told of a run.

    Args:
        options: the run's.
        optimizers: the module's.
        workers: number of ranks, N.

    Raises:
        ValueError: if the policy refuses an optimizer.
    """
    # A copy: another fit begins with what the user has given, not with what this one has learned.
    policy = copy.deepcopy(make_policy(options.staleness_policy))
    policy.bind(workers, options.gradients_per_update)
    for optimizer in optimizers:
        policy.check(optimizer)
    return policy, momentum_rule(options.momentum_correction, workers, options.gradients_per_update)
