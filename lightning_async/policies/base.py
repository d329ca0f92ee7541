"""What every staleness policy answers, with the neutral answers: an update as if its gradients were fresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Arrival", "StalenessPolicy", "overrides"]


class Arrival(NamedTuple):
    """A gradient that is about to be taken.

    Attributes:
        worker: the rank that computed it.
        staleness: its age s in versions: updates made since its parameters were read.
        version: the holder's version before it.
        samples: number of samples that it is the mean over; 0 if that is not known.
    """

    worker: int
    staleness: int
    version: int
    samples: int


class StalenessPolicy:
    """What is done with a gradient because of its age; this one does nothing.

    A policy of your own is a subclass that overrides what it changes. The holder asks it under its lock, one thread
    at a time, so it needs no locks of its own; it must be quick. The holder works with a copy of the instance that
    the strategy was given: what it learns goes into `state_dict`, which is a part of every checkpoint. With
    ``holder="process"`` the copy is pickled, so the class must be in a module that can be imported.

    What is not overridden costs nothing, and a factor of 1.0 changes no bit.

    Examples:
        >>> class HalfIfLate(StalenessPolicy):
        ...     def gradient_factor(self, arrival):
        ...         return 0.5 if arrival.staleness > 4 else 1.0
        >>> HalfIfLate().gradient_factor(Arrival(worker=1, staleness=7, version=20, samples=32))
        0.5
    """

    def bind(self, workers: int, gradients_per_update: int) -> None:
        """Tells the policy of its run, before anything else is asked.

        Args:
            workers: number of ranks, N.
            gradients_per_update: gradients that make a version, K.
        """

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the optimizer, and refuses one that the policy cannot work with.

        Every rank asks before training begins, so that the error comes early, and so does the holder of its own
        policy, after `bind`.

        Args:
            optimizer: the module's.

        Raises:
            ValueError: if it is refused; the message says what to take instead.
        """

    def gradient_factor(self, arrival: Arrival) -> float:
        """What the gradient is multiplied by before the optimizer, or the mean of several, sees it.

        It is asked once for each gradient that is taken, in the order in which they are. With several gradients in
        an update the mean still divides by the number of samples: a factor takes weight away, or adds some.

        Args:
            arrival: the gradient.

        Returns:
            A finite number of at least 0.
        """
        return 1.0

    def step_factor(self, arrivals: Sequence[Arrival]) -> float:
        """What the learning rate of an update is multiplied by; asked once for each update.

        Args:
            arrivals: the gradients that it is made of.

        Returns:
            A finite number of at least 0.
        """
        return 1.0

    def lateness(self, arrival: Arrival, group: Mapping[str, Any]) -> float:
        """The part of a gradient that `after_step` is given.

        Args:
            arrival: the gradient.
            group: a param group of the holder's optimizer, as in force now.
        """
        return 0.0

    def after_step(self, optimizer: torch.optim.Optimizer, late: Sequence[Tensor | None]) -> None:
        """Corrects parameters and optimizer state, in place, once the optimizer has stepped.

        It is called if `lateness` was not 0 for some gradient of the update, without autograd.

        Args:
            optimizer: the holder's, with the hyperparameters of the step in its param groups.
            late: for each of its parameters the sum of the update's gradients, each multiplied by its part in the
                mean and by its `lateness`; None where nothing is late.
        """

    def look_ahead(self, out: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Moves, in place, what a worker is answered with; called without autograd.

        Neither the holder's own parameters nor what the ranks have when they meet are moved.

        Args:
            out: a copy of each of the optimizer's parameters.
            optimizer: the holder's.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the policy has learned, in numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` has returned; called after `bind`."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({arguments})"


def overrides(policy: StalenessPolicy, name: str) -> bool:
    """Whether a policy has a method of its own in place of the neutral one.

    Examples:
        >>> overrides(StalenessPolicy(), "look_ahead")
        False
    """
    return getattr(type(policy), name) is not getattr(StalenessPolicy, name)
