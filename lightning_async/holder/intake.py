"""From arriving gradients to updates: what the staleness policy makes of them, their mean, the optimizers' steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder import blocks
from lightning_async.holder.gradient_mean import Gathered, GradientMean
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.scaled import ScaledGradients
from lightning_async.holder.team import Team
from lightning_async.holder.types import Push
from lightning_async.holder.update import HeldOptimizer
from lightning_async.policies.base import Arrival, StalenessPolicy, overrides
from lightning_async.policies.registry import kind_of

__all__ = ["GradientIntake", "PolicyError"]


class PolicyError(RuntimeError):
    """A staleness policy has failed or given a meaningless answer; the message says which, and how."""


class GradientIntake:
    """Takes gradients and steps the optimizers; has no lock of its own.

    Args:
        layout: where each parameter lies.
        flat: the parameters, in that layout.
        optimizers: over views of them.
        policy: what is done with a gradient because of its age; bound to its run. One that overrides nothing is never
            asked.
        gradients_per_update: gradients that make an update.
        looks_ahead: whether a policy may move what workers are answered with: not where no gradient can be stale.
        team: the holder's threads; None for the calling one alone.

    Raises:
        ValueError: if several gradients are to make an update, and there are several optimizers.
    """

    def __init__(
        self,
        layout: FlatLayout,
        flat: Tensor,
        optimizers: Sequence[HeldOptimizer],
        policy: StalenessPolicy,
        gradients_per_update: int,
        looks_ahead: bool = True,
        team: Team | None = None,
    ) -> None:
        if gradients_per_update > 1 and len(optimizers) > 1:
            raise ValueError("With several optimizers each gradient is an update: gradients_per_update must be 1.")
        self._layout = layout
        self._flat = flat
        self._optimizers = optimizers
        self._policy = policy
        self._needed = gradients_per_update
        self._asks = any(overrides(policy, name) for name in ("gradient_factor", "step_factor", "lateness"))
        self._corrects = overrides(policy, "lateness")
        self._moves = looks_ahead and overrides(policy, "look_ahead")
        self._team = team = team or Team()
        self._scaled, self._late_parts = ScaledGradients(layout, flat, team), ScaledGradients(layout, flat, team)
        self._mean: GradientMean | None = None
        self._late: GradientMean | None = None
        if gradients_per_update > 1:
            self._mean = self._new_mean()
            self._late = self._new_mean() if self._corrects else None
        self._is_plain = len(optimizers) == 1 == gradients_per_update and not self._asks and not self._moves
        # Of the gradients that have not become an update yet: what the policy was told, and the last one's groups.
        self._arrivals: list[Arrival] = []
        self._groups: Sequence[float] = ()

    def take(self, push: Push, staleness: int, version: int, filled: int) -> None:
        """Takes a gradient, and makes an update of it and those before it if they are enough.

        Args:
            push: the gradient.
            staleness: its age in versions.
            version: the holder's version before it.
            filled: how many gradients wait for more.

        Raises:
            PolicyError: if the staleness policy fails.
        """
        factor = 1.0
        if self._asks:
            arrival = Arrival(push.worker, staleness, version, push.samples)
            factor = self._factor(self._policy.gradient_factor, arrival)
            self._arrivals.append(arrival)
        if self._mean is None:
            self._take_alone(push, factor)
            return
        self._mean.add(push.gradients, push.samples, push.flat, factor)
        if self._late is not None:
            self._add_late(self._late, push, factor)
        self._groups = push.groups
        if filled + 1 == self._needed:
            self.complete()

    @property
    def joins_pushes(self) -> bool:
        """Whether gradients that wait for the holder may be taken in one pass: of a large model, and nobody asks."""
        return self._is_plain and self._layout.numel >= blocks.LARGE

    def can_join(self, push: Push) -> bool:
        """Whether a gradient may be taken in one pass with others."""
        complete = push.flat is not None and all(gradient is not None for gradient in push.gradients)
        return self.joins_pushes and push.finite and complete and self._optimizers[0].joins

    def take_together(self, pushes: Sequence[tuple[Push, Tensor]]) -> None:
        """Makes an update of each gradient, and copies the parameters after it; in one pass over memory.

        Args:
            pushes: gradients, `can_join` holds of each; and what the parameters after it are copied to.
        """
        self._optimizers[0].apply_together(
            self._flat, [(push.flat, push.groups, out) for push, out in pushes if push.flat is not None]
        )

    def complete(self) -> None:
        """Makes an update of the gradients that wait for more; there are some."""
        assert self._mean is not None
        weight = self._mean.weight
        late = None if self._late is None or not self._late.weight else self._late.take(weight)
        self._update(0, self._mean.take(), self._groups, late)

    def copy(self, out: Tensor) -> None:
        """Copies the parameters into ``out``, as the policy has a worker see them."""
        if out is self._flat:
            return
        self._team.copy(out, self._flat)
        if not self._moves:
            return
        for index, held in enumerate(self._optimizers):
            with held.in_force(), torch.no_grad():
                self._call(self._policy.look_ahead, self._layout.views(out, index), held.optimizer)

    def gathered(self, count: int) -> Gathered | None:
        """A copy of the gradients that wait for more; None if there are none.

        Args:
            count: how many.
        """
        gathered = None if self._mean is None else self._mean.gathered(count)
        if gathered is None:
            return None
        late = None if self._late is None else self._late.sums()
        return dataclasses.replace(gathered, late=late, arrivals=[(*arrival,) for arrival in self._arrivals])

    def forget(self) -> None:
        """Forgets the gradients that wait for more."""
        self._groups, self._arrivals = (), []
        for mean in (self._mean, self._late):
            if mean is not None:
                mean.load(None)

    def load(self, gathered: Gathered) -> bool:
        """Goes on from gradients that wait for more, after `forget`.

        Returns:
            Whether they wait; if they are enough by now, they have become an update.

        Raises:
            ValueError: if there are several optimizers.
        """
        if len(self._optimizers) > 1:
            raise ValueError("The checkpoint has gradients that wait for more, which several optimizers cannot have.")
        if self._asks:
            self._arrivals = [Arrival(*arrival) for arrival in gathered.arrivals]
        late = gathered.late if self._corrects else None
        if self._mean is not None and gathered.count < self._needed:
            self._mean.load(gathered)
            if self._late is not None and late is not None:
                self._late.add(late, samples=1)
            return True
        self._update(0, _divided(gathered.gradients, gathered.weight), (), late and _divided(late, gathered.weight))
        return False

    def policy_state(self) -> dict[str, Any]:
        """What the policy has learned, and whose it is, for a checkpoint."""
        return {"kind": kind_of(self._policy), "state": self._policy.state_dict()}

    def load_policy_state(self, saved: Mapping[str, Any]) -> None:
        """Lets the policy go on from what `policy_state` has returned, unless that was another one's."""
        if saved["kind"] == kind_of(self._policy):
            self._policy.load_state_dict(saved["state"])

    def _take_alone(self, push: Push, factor: float) -> None:
        """Makes an update of one gradient."""
        gradients, flat = push.gradients, push.flat
        if factor != 1.0:
            gradients, flat = self._scaled.scale(push.optimizer, gradients, factor, flat), None
        if not self._asks:
            self._optimizers[push.optimizer].apply(gradients, push.groups)
            return
        late = None
        if self._corrects:
            held = self._optimizers[push.optimizer]
            held.assign(push.groups)
            with held.in_force():
                parts = self._lateness(held)
            if parts is not None:
                late = self._late_parts.scale(push.optimizer, gradients, parts, flat)
        self._update(push.optimizer, gradients, push.groups, late)

    def _add_late(self, late: GradientMean, push: Push, factor: float) -> None:
        held = self._optimizers[push.optimizer]
        with held.in_force():
            parts = self._lateness(held)
        if isinstance(parts, float):
            late.add(push.gradients, push.samples, push.flat, factor * parts)
        elif parts is not None:
            late.add(push.gradients, push.samples, None, [factor * part for part in parts])

    def _lateness(self, held: HeldOptimizer) -> float | list[float] | None:
        """What part of the last gradient is late: of all parameters alike, or of each; None if nothing is."""
        groups = held.optimizer.param_groups
        parts = [float(self._call(self._policy.lateness, self._arrivals[-1], group)) for group in groups]
        if not any(parts):
            return None
        if len({*parts}) == 1:
            return parts[0]
        return [part for part, group in zip(parts, groups, strict=True) for _ in group["params"]]

    def _update(
        self, index: int, gradients: Sequence[Tensor | None], groups: Sequence[float], late: list[Tensor | None] | None
    ) -> None:
        held = self._optimizers[index]
        if not self._arrivals:
            held.apply(gradients, groups)
            return
        arrivals, self._arrivals = self._arrivals, []
        factor = self._factor(self._policy.step_factor, arrivals)
        if late is None:
            held.apply(gradients, groups, factor)
            return
        held.assign(groups)
        with held.in_force(factor), torch.no_grad():
            held.step(gradients)
            self._call(self._policy.after_step, held.optimizer, late)

    def _factor(self, method: Callable[..., object], argument: object) -> float:
        factor = self._call(method, argument)
        if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise PolicyError(
                f"{method.__name__} of the staleness policy {self._policy!r} returned {factor!r}, and must return a "
                "finite number of at least 0"
            )
        return float(factor)

    def _call(self, method: Callable[..., Any], *arguments: object) -> Any:
        try:
            return method(*arguments)
        except Exception as error:
            # Not as it is: a ValueError would be taken for the worker's.
            raise PolicyError(
                f"{method.__name__} of the staleness policy {self._policy!r} failed: {error!r}"
            ) from error

    def _new_mean(self) -> GradientMean:
        buffer = torch.zeros_like(self._flat)
        return GradientMean(buffer, self._layout.views(buffer, 0), self._team)


def _divided(sums: Sequence[Tensor | None], weight: float) -> list[Tensor | None]:
    return [None if one is None else one / weight for one in sums]
