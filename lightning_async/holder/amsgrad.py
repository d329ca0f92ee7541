r"""AMSGrad as a torch optimizer, and what the holder makes of a user's optimizer.

Neighbours: `update.py` steps a `holder_optimizer` over the holder's buffers, `amsgrad.py` asks
`check_optimizer` and converts its refusal. No Lightning here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_async.holder.hyperparams import KERNEL_KEYS

__all__ = [
    "AMSGrad",
    "UnsupportedOptimizerError",
    "check_optimizer",
    "convert_to_amsgrad_state",
    "holder_optimizer",
]

# A step count at which 1 - beta**step is exactly 1 for every beta below 1, and that adding 1 does not change.
STEP_AT_INFINITY = 1e30

# What an older or another optimizer's state dict may lack.
_KEPT_IF_MISSING = ("bias_correction", "decoupled_weight_decay", "maximize")

_ADVICE = (
    "Return lightning_async.AMSGrad(...) or torch.optim.Adam(..., amsgrad=True) from configure_optimizers, "
    'or use strategy="async", which takes other optimizers too, or strategy="ddp".'
)


class UnsupportedOptimizerError(TypeError):
    """An optimizer that asynchronous AMSGrad cannot stand in for; the message says what to return instead."""


class AMSGrad(torch.optim.Adam):
    r"""AMSGrad, with or without bias correction.

    With a gradient :math:`g` (to which :math:`\lambda x` is added if weight decay is not decoupled),

    .. math::
        \begin{aligned}
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \hat v &\leftarrow \max(\hat v, v) \\
        x &\leftarrow x - \alpha_t \, m / (\sqrt{\hat v} / c_t + \epsilon)
        \end{aligned}

    With bias correction :math:`\alpha_t = \alpha / (1 - \beta_1^t)` and
    :math:`c_t = \sqrt{1 - \beta_2^t}`: bit for bit `torch.optim.Adam(amsgrad=True)`, and
    `torch.optim.AdamW(amsgrad=True)` with decoupled weight decay. Without it :math:`\alpha_t = \alpha` and
    :math:`c_t = 1`: Algorithm 1 of `arXiv:2002.09095 <https://arxiv.org/abs/2002.09095>`_ with
    :math:`\epsilon` in the denominator.

    State dicts are exchanged freely with those of `torch.optim.Adam` and `torch.optim.AdamW`. On loading,
    the kernel (``fused``) stays this optimizer's own, settings that the state dict lacks stay as they are,
    and a state without AMSGrad is taken over as `convert_to_amsgrad_state` describes.

    Args:
        params: parameters or param groups. A group may have its own ``lr``, ``betas``, ``eps``,
            ``weight_decay``, ``decoupled_weight_decay`` and ``bias_correction``.
        lr: step size :math:`\alpha`.
        betas: :math:`\beta_1` and :math:`\beta_2`.
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`.
        decoupled_weight_decay: shrinks the parameters by :math:`\alpha \lambda` instead of adding to the
            gradient.
        bias_correction: whether the moments are corrected for having started from zero.
        fused: torch's fused kernel: True, False, or None for torch's default.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AMSGrad([weight], lr=0.1, betas=(0.0, 0.0), eps=0.0, bias_correction=False)
        >>> weight.grad = torch.tensor([4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        *,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad=True,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.defaults["bias_correction"] = bias_correction
        for group in self.param_groups:
            group.setdefault("bias_correction", bias_correction)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.setdefault("bias_correction", True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of `torch.optim.Adam` or of `torch.optim.AdamW`.

        Args:
            state_dict: what `state_dict` returned; it is left as it is.
        """
        state_dict = {
            **state_dict,
            "state": {
                key: dict(value) if isinstance(value, dict) else value for key, value in state_dict["state"].items()
            },
            "param_groups": [dict(group) for group in state_dict["param_groups"]],
        }
        convert_to_amsgrad_state(state_dict)
        # A different number of groups is left for torch to refuse.
        for own, loaded in zip(self.param_groups, state_dict["param_groups"], strict=False):
            loaded.update({key: own[key] for key in KERNEL_KEYS})
            for key in _KEPT_IF_MISSING:
                loaded.setdefault(key, own[key])
        super().load_state_dict(state_dict)

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        has_complex = super()._init_group(  # type: ignore[no-untyped-call]
            group, params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps
        )
        if not group["bias_correction"] and state_steps:
            self._count(state_steps)
            # Adam's own kernels, told that they are infinitely late, correct by exactly 1.
            infinity: dict[tuple[torch.device, torch.dtype], Tensor] = {}
            for i, step in enumerate(state_steps):
                key = (step.device, step.dtype)
                if key not in infinity:
                    infinity[key] = torch.full_like(step, STEP_AT_INFINITY)
                state_steps[i] = infinity[key]
        return bool(has_complex)

    def _count(self, steps: list[Tensor]) -> None:
        # A gradient scaler hands found_inf to a fused step, which then leaves everything as it was.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            torch._foreach_add_(steps, 1)
        else:
            for step in steps:
                step.add_(1 - found_inf.to(step.device))


def holder_optimizer(
    template: torch.optim.Optimizer, params: Sequence[Sequence[torch.nn.Parameter]]
) -> torch.optim.Optimizer:
    """The optimizer that the holder steps: a template's update and hyperparameters, over other tensors.

    It is always an `AMSGrad`, which computes what the template would with AMSGrad switched on: Adam, AdamW
    or the paper's update, group by group. Where a group's tensors allow it, it uses the fused kernel, and
    keeps using it whatever state dict is loaded. Over tensors of the same sizes as the template's (views of
    one flat buffer, say) it gives the bits that a fused template would; the kernel rounds the end of a tensor
    that fills no vector register differently, so other sizes agree to rounding only.

    Args:
        template: an optimizer that `check_optimizer` has accepted.
        params: for every param group of the template, the tensors that take the place of its parameters.

    Returns:
        The optimizer, with no state yet.

    Raises:
        ValueError: if there is not one list for every param group.

    Examples:
        >>> weight, flat = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(4))
        >>> template = torch.optim.AdamW([weight], lr=0.5, amsgrad=True)
        >>> group = holder_optimizer(template, [[flat]]).param_groups[0]
        >>> group["lr"], group["decoupled_weight_decay"], group["amsgrad"], group["fused"]
        (0.5, True, True, True)
    """
    if len(params) != len(template.param_groups):
        raise ValueError(
            f"The template has {len(template.param_groups)} param groups, and tensors came for {len(params)}."
        )
    groups: list[dict[str, Any]] = []
    for source, tensors in zip(template.param_groups, params, strict=True):
        beta1, beta2 = source["betas"]
        fusible = all(tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda") for tensor in tensors)
        groups.append(
            {
                "params": list(tensors),
                "lr": float(source["lr"]),
                "betas": (float(beta1), float(beta2)),
                "eps": float(source["eps"]),
                "weight_decay": float(source["weight_decay"]),
                "decoupled_weight_decay": source.get("decoupled_weight_decay", isinstance(template, torch.optim.AdamW)),
                "bias_correction": source.get("bias_correction", True),
                "maximize": source.get("maximize", False),
                "fused": True if fusible else None,
            }
        )
    return AMSGrad(groups)


def check_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is AMSGrad, after refusing those that cannot be made into it.

    Args:
        optimizer: what the user's ``configure_optimizers`` returned.

    Returns:
        True for `AMSGrad` and for torch's Adam and AdamW with ``amsgrad=True``; False for Adam and AdamW
        with it off in some param group, where the caller is to switch it on.

    Raises:
        UnsupportedOptimizerError: for anything else; the message says what to return instead.

    Examples:
        >>> weights = [torch.nn.Parameter(torch.ones(1))]
        >>> check_optimizer(torch.optim.Adam(weights, amsgrad=True))
        True
        >>> check_optimizer(torch.optim.AdamW(weights))
        False
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise UnsupportedOptimizerError(f"async_amsgrad cannot stand in for {name}{_reason(optimizer)}. {_ADVICE}")
    for method in ("step", "_init_group"):
        if _source(type(optimizer), method) not in {
            _source(known, method) for known in (torch.optim.Adam, torch.optim.AdamW, AMSGrad)
        }:
            raise UnsupportedOptimizerError(
                f"async_amsgrad cannot stand in for {name}, which overrides Adam's {method}: the update is "
                f"computed elsewhere, where that override has no effect. {_ADVICE}"
            )
    for flag in ("capturable", "differentiable"):
        if any(group.get(flag, False) for group in optimizer.param_groups):
            raise UnsupportedOptimizerError(
                f"async_amsgrad cannot stand in for {name} with {flag}=True: the update is computed where "
                f"neither a CUDA graph nor autograd can record it. Leave {flag} out. {_ADVICE}"
            )
    return all(group.get("amsgrad", False) for group in optimizer.param_groups)


def convert_to_amsgrad_state(optimizer_state: dict[str, Any]) -> bool:
    r"""Makes the state dict of an Adam without AMSGrad one of an Adam with it, in place.

    A missing maximum :math:`\hat v` starts from the second moment :math:`v` of the state: the maximum is
    taken from there on, and the next step differs from Adam's only where :math:`v` falls.

    Args:
        optimizer_state: what the optimizer's ``state_dict`` returned.

    Returns:
        Whether any maximum was missing.

    Examples:
        >>> state = {"state": {0: {"exp_avg_sq": torch.ones(1)}}, "param_groups": [{"amsgrad": False}]}
        >>> convert_to_amsgrad_state(state), state["param_groups"]
        (True, [{'amsgrad': True}])
        >>> convert_to_amsgrad_state(state)
        False
    """
    filled = False
    for state in optimizer_state["state"].values():
        if isinstance(state, dict) and "exp_avg_sq" in state and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
            filled = True
    for group in optimizer_state["param_groups"]:
        group["amsgrad"] = True
    return filled


def _reason(optimizer: torch.optim.Optimizer) -> str:
    if isinstance(optimizer, torch.optim.LBFGS):
        return ", which re-evaluates its closure"
    if isinstance(optimizer, torch.optim.SparseAdam):
        return ", whose gradients are sparse"
    return ", which is not AMSGrad"


def _source(kind: type, method: str) -> object:
    # Torch wraps step for its hooks, and stores the wrapper on whichever class was instantiated first.
    return inspect.unwrap(getattr(kind, method))
