"""What is done with a gradient because of its age: one class for each rule, and the momentum that the holder uses.

Knows torch and nothing else of this package.
"""

from lightning_async.policies.base import Arrival, StalenessPolicy
from lightning_async.policies.damping import AgeDamping
from lightning_async.policies.delay_adaptive import DelayAdaptiveStep
from lightning_async.policies.from_ddp import FromDDP
from lightning_async.policies.look_ahead import LookAhead
from lightning_async.policies.ordered_momentum import OrderedMomentum
from lightning_async.policies.registry import POLICIES, make_policy
from lightning_async.policies.rescaled import RescaledByFrequency

__all__ = [
    "POLICIES",
    "AgeDamping",
    "Arrival",
    "DelayAdaptiveStep",
    "FromDDP",
    "LookAhead",
    "OrderedMomentum",
    "RescaledByFrequency",
    "StalenessPolicy",
    "make_policy",
]
