"""Any torch optimizer, rebuilt over the holder's buffers.

AMSGrad has a kernel of its own (`amsgrad.py`).
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_async.holder.amsgrad import UnsupportedOptimizerError, check_optimizer
from lightning_async.holder.held_state import HeldState
from lightning_async.holder.hyperparams import make_plain
from lightning_async.holder.layout import exchanged, laid_out_like

__all__ = [
    "assemble",
    "check_steppable",
    "dismantle",
    "is_amsgrad",
    "lay_out_state",
    "rebuild",
    "step_without_hooks",
]

# Of the function that torch puts around every optimizer's step.
_HOOKS_AROUND: Any = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__

_ADVICE = 'Return another optimizer from configure_optimizers, or use strategy="ddp".'

# Fused kernels, by the types of device that have them.
_FUSED: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("cpu", "cuda"),
    torch.optim.Adam: ("cpu", "cuda"),
    torch.optim.AdamW: ("cpu", "cuda"),
    torch.optim.Adagrad: ("cpu",),
}


def is_amsgrad(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the holder's own AMSGrad computes exactly this optimizer's update.

    Examples:
        >>> weights = [nn.Parameter(torch.ones(1))]
        >>> is_amsgrad(torch.optim.AdamW(weights, amsgrad=True)), is_amsgrad(torch.optim.SGD(weights))
        (True, False)
    """
    try:
        return check_optimizer(optimizer)
    except UnsupportedOptimizerError:
        return False


def check_steppable(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that cannot be stepped elsewhere, with gradients alone.

    One from outside of torch is tried out: a copy of it takes one step, over copies of the parameters.

    Args:
        optimizer: what the user's ``configure_optimizers`` returned.

    Raises:
        UnsupportedOptimizerError: if it needs its closure, takes sparse gradients, records its step, talks to other
            ranks or cannot be copied; the message says what to do instead.

    Examples:
        >>> check_steppable(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
        >>> check_steppable(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]))
        Traceback (most recent call last):
        lightning_async.holder.amsgrad.UnsupportedOptimizerError: The holder cannot step LBFGS, which re-evaluates its \
closure. Return another optimizer from configure_optimizers, or use strategy="ddp".
    """
    kind = type(optimizer)
    reason = _reason(optimizer)
    if reason is None and not kind.__module__.startswith(("torch.optim", "lightning_async")):
        reason = _try(optimizer)
    if reason is not None:
        raise UnsupportedOptimizerError(f"The holder cannot step {kind.__name__}, {reason}. {_ADVICE}")


def rebuild(template: torch.optim.Optimizer, params: Sequence[Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
    """The same optimizer over other tensors.

    Whatever in it refers to a parameter (groups, state, attributes of a subclass, an optimizer inside it) refers to the
    tensor that takes its place. Where the user has not chosen a kernel, torch's own optimizers get the fused one, or
    the one for lists of tensors.

    Args:
        template: an optimizer that `check_steppable` has accepted.
        params: for every param group of the template, the tensors that take the place of its parameters that are
            `exchanged`; the others are left out.

    Returns:
        The optimizer; it shares nothing with the template.

    Examples:
        >>> weight, flat = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        >>> group = rebuild(torch.optim.RMSprop([weight], lr=0.5), [[flat]]).param_groups[0]
        >>> group["params"][0] is flat, group["lr"], group["foreach"]
        (True, 0.5, True)
    """
    optimizer = _copy(template, params)
    for group, tensors in zip(optimizer.param_groups, params, strict=True):
        for left_out in {*group["params"]} - {*tensors}:
            optimizer.state.pop(left_out, None)
        group["params"] = [*tensors]
        make_plain(group)
        if type(template).__module__.startswith("torch.optim"):
            _choose_kernel(type(template), group)
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            # What the constructor has made is of the module's type and device, and the holder's may be another.
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and key != "step"
                and value.shape == parameter.shape
            ):
                state[key] = value.to(parameter.device, parameter.dtype)
    lay_out_state(optimizer)
    return optimizer


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Puts what an optimizer keeps for its parameters into the memory order of these, in place."""
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor) or not isinstance(state, dict):
            continue
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = laid_out_like(value, parameter)


def dismantle(optimizer: torch.optim.Optimizer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What an optimizer is made of, for `assemble` in another process; its parameters are copies in host memory.

    Examples:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
        >>> again = assemble(*dismantle(sgd))
        >>> type(again).__name__, again.param_groups[0]["lr"], again.param_groups[0]["params"][0].tolist()
        ('SGD', 0.5, [1.0, 1.0])
    """
    params = [
        [nn.Parameter(tensor.detach().cpu().clone(), tensor.requires_grad) for tensor in group["params"]]
        for group in optimizer.param_groups
    ]
    return type(optimizer), _attributes(_copy(optimizer, params, everything=True))


def assemble(kind: type[torch.optim.Optimizer], attributes: dict[str, Any]) -> torch.optim.Optimizer:
    """Inverse of `dismantle`."""
    optimizer: torch.optim.Optimizer = kind.__new__(kind)
    # Not through the subclass's __setstate__, nor its __getstate__, which leaves attributes out.
    torch.optim.Optimizer.__setstate__(optimizer, attributes)
    return optimizer


def step_without_hooks(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The optimizer's ``step`` without torch's hooks around it: they belong to the step that the user's code makes.

    Torch wraps the method for them. An instance has its own hooks, but those that are registered for all optimizers
    would be called for the holder's too, in whichever thread updates.
    """
    step: Any = type(optimizer).step
    if getattr(step, "__code__", None) is _HOOKS_AROUND:
        step = step.__wrapped__
    return MethodType(step, optimizer)


def _copy(
    template: torch.optim.Optimizer, params: Sequence[Sequence[nn.Parameter]], everything: bool = False
) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = type(template).__new__(type(template))
    memo: dict[int, Any] = {id(template): optimizer}
    for group, tensors in zip(template.param_groups, params, strict=True):
        replaced = [parameter for parameter in group["params"] if everything or exchanged(parameter)]
        memo |= {id(old): new for old, new in zip(replaced, tensors, strict=True)}
    # As in `assemble`.
    torch.optim.Optimizer.__setstate__(optimizer, copy.deepcopy(_attributes(template), memo))
    return optimizer


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # Hooks are the user's process's affair; `step` there is a scheduler's or the proxy's. What shows the holder's state
    # would fetch it.
    return {
        name: defaultdict(dict) if isinstance(value, HeldState) else value
        for name, value in vars(optimizer).items()
        if name not in ("step", "_opt_called", "_step_supports_amp_scaling") and not name.endswith("_hooks")
    }


def _choose_kernel(kind: type[torch.optim.Optimizer], group: dict[str, Any]) -> None:
    if group.get("fused") or group.get("foreach") is not None:
        return
    devices = _FUSED.get(kind, ())
    if group.get("fused", False) is None and all(tensor.device.type in devices for tensor in group["params"]):
        group["fused"] = True
    elif "foreach" in group:
        group["foreach"] = True


def _reason(optimizer: torch.optim.Optimizer) -> str | None:
    kind = type(optimizer)
    closure = inspect.signature(inspect.unwrap(kind.step)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "which re-evaluates its closure"
    if isinstance(optimizer, torch.optim.SparseAdam):
        return "whose gradients are sparse (dense ones can be had by sparse=False in the embedding, with Adam)"
    if kind.__module__.startswith("torch.distributed"):
        return "which talks to the other ranks"
    for flag in ("capturable", "differentiable"):
        if any(group.get(flag, False) for group in optimizer.param_groups):
            return f"since {flag}=True asks for a step that is recorded, and it is made elsewhere; leave {flag} out"
    modules = [name for name, value in vars(optimizer).items() if isinstance(value, nn.Module)]
    if modules:
        return f"which keeps a module in its attribute {modules[0]}: the holder has parameters and no module"
    return None


def _try(optimizer: torch.optim.Optimizer) -> str | None:
    """Steps a copy of the optimizer over copies of its parameters; returns what is wrong with it."""
    params = [
        [nn.Parameter(parameter.detach().clone()) for parameter in group["params"] if exchanged(parameter)]
        for group in optimizer.param_groups
    ]
    try:
        trial = rebuild(optimizer, params)
        for parameter in (parameter for group in params for parameter in group):
            parameter.grad = torch.ones_like(parameter)
        if callable(begin := getattr(trial, "train", None)):
            # A schedule-free one, which steps in that mode only.
            begin()
        with torch.random.fork_rng(devices=[]):
            step_without_hooks(trial)()
    except Exception as error:
        return f"which failed when a copy of it made a step without a closure: {error!r}"
    return None
