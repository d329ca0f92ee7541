"""The holder's optimizers: any torch optimizer by its own step, AMSGrad by its kernel."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_async.holder.amsgrad import AMSGrad, convert_to_amsgrad_state, holder_optimizer
from lightning_async.holder.fused import FusedUpdate, Step
from lightning_async.holder.held_state import StateByPlace, same_state
from lightning_async.holder.hyperparams import KERNEL_KEYS, HyperparamLayout, make_plain
from lightning_async.holder.rebuild import is_amsgrad, lay_out_state, rebuild
from lightning_async.holder.step_update import FusedSGDUpdate, StepUpdate
from lightning_async.holder.team import Team
from lightning_async.policies.momentum import corrected_group

__all__ = ["HeldOptimizer"]


class HeldOptimizer:
    """One optimizer of the holder: its update, its hyperparameters and its state.

    Args:
        template: the module's optimizer, with no state that matters.
        params: for every param group of the template, the tensors that take the place of its parameters that are
            exchanged; the others are left out.
        momentum_rule: what a step uses in place of the momentum in its param groups; None leaves it.
        team: the holder's threads; None for the calling one alone.

    Attributes:
        momentum_rule: the same; may be set between two steps.
    """

    def __init__(
        self,
        template: torch.optim.Optimizer,
        params: Sequence[Sequence[nn.Parameter]],
        momentum_rule: Callable[[float], float] | None = None,
        team: Team | None = None,
    ) -> None:
        self.momentum_rule = momentum_rule
        self.hyperparams = HyperparamLayout(template)
        self.optimizer = holder_optimizer(template, params) if is_amsgrad(template) else rebuild(template, params)
        self._update = _update_of(self.optimizer, team or Team())
        for group, source, names in zip(
            self.optimizer.param_groups, template.param_groups, self.hyperparams.names, strict=True
        ):
            for key in names:
                # What the user keeps in a group of AMSGrad travels, too, and is of no use there.
                group.setdefault(key, source[key])
        self._assigned: Sequence[float] = self.hyperparams.read(template.param_groups)
        self._before_steps = self._own_values()

    def apply(self, gradients: Sequence[Tensor | None], hyperparams: Sequence[float], step_factor: float = 1.0) -> None:
        """Applies one update.

        Args:
            gradients: one per parameter, None where it takes no part.
            hyperparams: the hyperparameters of all param groups, in the order of `HyperparamLayout`; none for those of
                before.
            step_factor: what the learning rate is multiplied by.
        """
        self.assign(hyperparams)
        if step_factor == 1.0 and self.momentum_rule is None:
            self.step(gradients)
            return
        with self.in_force(step_factor):
            self.step(gradients)

    @property
    def joins(self) -> bool:
        """Whether updates may be made together, if all parameters have a gradient; see `FusedUpdate.joins`."""
        return isinstance(self._update, FusedUpdate) and self._update.joins

    def apply_together(self, flat: Tensor, updates: Sequence[tuple[Tensor, Sequence[float], Tensor | None]]) -> None:
        """Applies updates one after the other, in one pass over memory.

        Args:
            flat: the optimizer's parameters, in a row.
            updates: of each the gradient of all parameters, in a row; the hyperparameters, as `apply` takes them; what
                the parameters after it are copied to, if they are.
        """
        assert isinstance(self._update, FusedUpdate)
        steps = []
        for gradient, hyperparams, out in updates:
            self.assign(hyperparams)
            with self.in_force():
                steps.append(Step(gradient, self._update.kernels(), out))
        self._update.together(flat, steps)

    def assign(self, hyperparams: Sequence[float]) -> None:
        """Sets the hyperparameters of all param groups, as `apply` does."""
        if hyperparams and hyperparams != self._assigned:
            self.hyperparams.assign(self.optimizer.param_groups, hyperparams, self._assigned)
            self._assigned = hyperparams

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Applies one update with the hyperparameters that are there."""
        self._update(gradients)

    @contextmanager
    def in_force(self, step_factor: float = 1.0) -> Iterator[None]:
        """Shows the learning rate and the momentum that a step uses, in place of the user's, for a while.

        What a step itself changes in them stays.

        Raises:
            RuntimeError: if a learning rate is to be scaled and there is none.
        """
        changed: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        for group in self.optimizer.param_groups:
            now = {} if self.momentum_rule is None else corrected_group(group, self.momentum_rule)
            if step_factor != 1.0:
                if "lr" not in group:
                    kind = type(self.optimizer).__name__
                    raise RuntimeError(
                        f"a staleness policy's step_factor scales the learning rate, and {kind} has none"
                    )
                now["lr"] = group["lr"] * step_factor
            changed.append((group, {key: group[key] for key in now}, now))
        for group, _, now in changed:
            group.update(now)
        try:
            yield
        finally:
            for group, before, now in changed:
                group.update({key: before[key] for key, value in now.items() if group[key] is value})

    def tensors(self) -> list[Tensor]:
        """The tensors of the optimizer's state that `state_dict` copies one by one."""
        states = [state for state in self.optimizer.state.values() if isinstance(state, dict)]
        return [value for state in states for value in state.values() if type(value) is Tensor]

    def state_dict(self, copy_tensor: Callable[[Tensor], Tensor] = Tensor.clone) -> dict[str, Any]:
        """A copy of the optimizer's state dict, whose tensors own no more memory than their values take.

        Args:
            copy_tensor: makes the copies of `tensors`.
        """
        state_dict = self.optimizer.state_dict()
        states = [state for state in state_dict["state"].values() if isinstance(state, dict)]
        copies = {
            id(value): copy_tensor(value) for state in states for value in state.values() if type(value) is Tensor
        }
        return copy.deepcopy(state_dict, copies)

    def adapted(self) -> list[dict[str, Any]]:
        """For each param group the values that the optimizer's own steps have changed; empty for most optimizers."""
        if isinstance(self.optimizer, AMSGrad):
            return [{} for _ in self.optimizer.param_groups]
        scratch = copy.deepcopy(self._before_steps)
        self.hyperparams.assign(scratch, self._assigned, self.hyperparams.read(scratch))
        return [
            {key: value for key, value in own.items() if key not in expected or not _same(value, expected[key])}
            for own, expected in zip(self._own_values(), scratch, strict=True)
        ]

    def take_adapted(self) -> list[dict[str, Any]]:
        """What `adapted` says, for workers that set it in their own groups, from where it counts as known.

        Values that cannot travel with a push stay here.
        """
        told = [
            {key: value for key, value in values.items() if key not in names or _can_travel(value)}
            for values, names in zip(self.adapted(), self.hyperparams.names, strict=True)
        ]
        if any(told):
            self.hyperparams.assign(self._before_steps, self._assigned, self.hyperparams.read(self._before_steps))
            for group, values in zip(self._before_steps, told, strict=True):
                group.update(copy.deepcopy(values))
            self._assigned = self.hyperparams.read(self._before_steps)
        return told

    def load_state(self, state: StateByPlace) -> bool:
        """Takes over a state if it differs from its own; hyperparameters and kernel stay.

        Returns:
            Whether it differed.
        """
        own = self.optimizer.state_dict()
        if same_state(own["state"], state):
            return False
        wanted = {**own, "state": copy.deepcopy(dict(state))}
        if isinstance(self.optimizer, AMSGrad):
            convert_to_amsgrad_state(wanted)
        self._load_state_dict(wanted)
        return True

    def load(self, state: Mapping[str, Any]) -> bool:
        """Loads a state dict in torch's format; the kernel stays.

        Returns:
            True if AMSGrad took the state of an Adam without it, and started the maximum from its ``exp_avg_sq``.
        """
        own = copy.deepcopy(dict(state))
        converted = isinstance(self.optimizer, AMSGrad) and convert_to_amsgrad_state(own)
        # A different number of groups is left for torch to refuse.
        for mine, loaded in zip(self.optimizer.param_groups, own["param_groups"], strict=False):
            loaded.update({key: mine[key] for key in KERNEL_KEYS if key in mine})
            for key in mine.keys() - loaded.keys() - {"params"}:
                loaded[key] = mine[key]
        self._load_state_dict(own)
        for group in self.optimizer.param_groups:
            make_plain(group)
        self._assigned = self.hyperparams.read(self.optimizer.param_groups)
        self._before_steps = self._own_values()
        return converted

    def _load_state_dict(self, wanted: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(wanted)
        lay_out_state(self.optimizer)
        self._update.forget()

    def _own_values(self) -> list[dict[str, Any]]:
        skipped = {"params", *KERNEL_KEYS}
        return [
            copy.deepcopy({key: value for key, value in group.items() if key not in skipped})
            for group in self.optimizer.param_groups
        ]


def _update_of(optimizer: torch.optim.Optimizer, team: Team) -> StepUpdate:
    if isinstance(optimizer, AMSGrad) or (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        and all(group["fused"] and "decoupled_weight_decay" in group for group in optimizer.param_groups)
    ):
        return FusedUpdate(optimizer, team)
    if type(optimizer) is torch.optim.SGD and any(group["fused"] for group in optimizer.param_groups):
        return FusedSGDUpdate(optimizer)
    return StepUpdate(optimizer)


def _can_travel(value: object) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(
        (isinstance(item, Real) or (isinstance(item, Tensor) and item.numel() == 1)) and math.isfinite(float(item))
        for item in values
    )


def _same(first: object, second: object) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    return bool(first == second)
