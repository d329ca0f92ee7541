"""Faults as data, to test how a run bears them.

`FaultInjector` lets a `Fault` strike a rank at a step and a place; ``lightning-async chaos`` strikes the ranks of any
command from outside, now and then.
"""

from lightning_async.chaos.fault import PLACES, Fault, InjectedError, Kind
from lightning_async.chaos.injector import FaultInjector

__all__ = ["PLACES", "Fault", "FaultInjector", "InjectedError", "Kind"]
