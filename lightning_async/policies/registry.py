"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.damping import AgeDamping
from lightning_async.policies.delay_adaptive import DelayAdaptiveStep
from lightning_async.policies.from_ddp import FromDDP
from lightning_async.policies.look_ahead import LookAhead
from lightning_async.policies.ordered_momentum import OrderedMomentum
from lightning_async.policies.rescaled import RescaledByFrequency

__all__ = ["POLICIES", "describe_policy", "kind_of", "make_policy"]

# What the strategy's argument `staleness_policy` takes by name, with the defaults of each class.
POLICIES: dict[str, Callable[[], StalenessPolicy]] = {
    "plain": StalenessPolicy,
    "damping": AgeDamping,
    "delay_adaptive": DelayAdaptiveStep,
    "rescaled": RescaledByFrequency,
    "ordered_momentum": OrderedMomentum,
    "look_ahead": LookAhead,
    "from_ddp": FromDDP,
}


def make_policy(value: object) -> StalenessPolicy:
    """The policy that an argument stands for.

    Args:
        value: a name, or a policy, which is returned as it is.

    Raises:
        ValueError: if it is neither; the message lists the names.

    Examples:
        >>> make_policy("damping"), make_policy(AgeDamping(rate=0.5))
        (AgeDamping(rate=0.2), AgeDamping(rate=0.5))
        >>> make_policy("dampening")
        Traceback (most recent call last):
        ValueError: staleness_policy must be one of 'plain', 'damping', 'delay_adaptive', 'rescaled', \
'ordered_momentum', 'look_ahead', 'from_ddp' or \
an instance of a subclass of lightning_async.StalenessPolicy, not 'dampening'.
    """
    if isinstance(value, StalenessPolicy):
        return value
    if isinstance(value, str) and value in POLICIES:
        return POLICIES[value]()
    raise ValueError(
        f"staleness_policy must be one of {', '.join(map(repr, POLICIES))} or an instance of a subclass of "
        f"lightning_async.StalenessPolicy, not {value!r}."
    )


def describe_policy(value: str | StalenessPolicy) -> str:
    """A policy in a word: its name, or its class and arguments.

    Examples:
        >>> describe_policy("damping"), describe_policy(AgeDamping(rate=0.5))
        ('damping', 'AgeDamping(rate=0.5)')
    """
    return value if isinstance(value, str) else repr(value)


def kind_of(policy: StalenessPolicy) -> str:
    """A policy's class, as a checkpoint names it.

    Examples:
        >>> kind_of(AgeDamping())
        'lightning_async.policies.damping.AgeDamping'
    """
    return f"{type(policy).__module__}.{type(policy).__qualname__}"
