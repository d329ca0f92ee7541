"""A late gradient enters the momentum as if it had come in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.policies.base import Arrival, StalenessPolicy
from lightning_async.policies.momentum_state import (
    GroupState,
    family_of,
    group_states,
    move_along_adam,
    refuse_optimizer,
)

__all__ = ["OrderedMomentum"]


class OrderedMomentum(StalenessPolicy):
    r"""Ordered momentum, OrMo (`arXiv:2407.19234 <https://arxiv.org/abs/2407.19234>`_), and its like for Adam.

    Had a gradient g of age s come s versions ago, the momentum would have decayed it s times by now, and it would have
    moved the parameters in each of these steps. For SGD with momentum b,

    .. math::
        \begin{aligned}
        m &\leftarrow b\, m + b^s g \\
        x &\leftarrow x - \alpha \left( m + \frac{1 - b^s}{1 - b}\, g \right)
        \end{aligned}

    Since the optimizer has stepped as if g were fresh, this corrects by the late part :math:`l = (1 - b^s)\, g`:

    - SGD: :math:`m \leftarrow m - l` and :math:`x \leftarrow x - \alpha \frac{b}{1 - b}\, l`;
    - SGD with Nesterov momentum: the same, with :math:`\frac{b^2}{1 - b}`;
    - Adam and AMSGrad, by the same reasoning, which is ours and not the paper's:
      :math:`m \leftarrow m - (1 - \beta_1)\, l` and
      :math:`x \leftarrow x - \alpha_t\, \beta_1 l / (\sqrt{\hat v} / c_t + \epsilon)`, with the bias corrections and
      the denominator of the step itself; v stays as it is.

    With several gradients in an update, l is the mean of their late parts, weighted as the gradients are; b is the
    momentum in force as each is taken. Coupled weight decay has no age and no part in l. At age 0 nothing changes.

    Examples:
        >>> policy, arrival = OrderedMomentum(), Arrival(worker=0, staleness=2, version=9, samples=32)
        >>> policy.lateness(arrival, {"momentum": 0.5}), policy.lateness(arrival, {"betas": (0.5, 0.999)})
        (0.75, 0.75)
    """

    @override
    def check(self, optimizer: torch.optim.Optimizer) -> None:
        refuse_optimizer("OrderedMomentum", "corrects the", optimizer)
        if any(group.get("dampening") for group in optimizer.param_groups):
            raise ValueError(
                "OrderedMomentum takes SGD without dampening, which a parameter's first gradient is exempt from. Leave "
                'dampening out, or take staleness_policy="plain"'
            )

    @override
    def lateness(self, arrival: Arrival, group: Mapping[str, Any]) -> float:
        momentum: float = group["betas"][0] if "betas" in group else group["momentum"]
        # Without momentum nothing of a gradient is left to the next step, so that none is late.
        return 1.0 - momentum**arrival.staleness if momentum else 0.0

    @override
    def after_step(self, optimizer: torch.optim.Optimizer, late: Sequence[Tensor | None]) -> None:
        if family_of(optimizer) == "adam":
            for chosen in group_states(optimizer, late, "exp_avg"):
                _correct_adam(chosen)
        else:
            for chosen in group_states(optimizer, late, "momentum_buffer"):
                _correct_sgd(chosen)


def _correct_sgd(chosen: GroupState) -> None:
    group, sign = chosen.group, _sign(chosen.group)
    momentum = group["momentum"]
    ahead = momentum / (1.0 - momentum) * (momentum if group["nesterov"] else 1.0)
    torch._foreach_add_([state["momentum_buffer"] for state in chosen.states], chosen.others, alpha=-sign)
    torch._foreach_add_(chosen.parameters, chosen.others, alpha=-sign * group["lr"] * ahead)


def _correct_adam(chosen: GroupState) -> None:
    sign, beta = _sign(chosen.group), chosen.group["betas"][0]
    torch._foreach_add_([state["exp_avg"] for state in chosen.states], chosen.others, alpha=-sign * (1.0 - beta))
    move_along_adam(chosen, chosen.parameters, chosen.others, sign * beta)


def _sign(group: Mapping[str, Any]) -> float:
    return -1.0 if group["maximize"] else 1.0
