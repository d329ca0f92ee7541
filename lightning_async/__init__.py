"""Asynchronous data-parallel training for PyTorch Lightning.

``import lightning_async`` registers the strategies, so that ``Trainer(strategy="async_amsgrad", devices=4)`` works.

Lightning itself is imported by the user's code, before or after. What knows nothing of Lightning (the holder's own
process, for one) imports this package without it: the names below are looked up when they are first used.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_async.on_demand import names_on_demand, when_imported

if TYPE_CHECKING:
    from lightning_async.callbacks import AsyncMonitor
    from lightning_async.holder.amsgrad import AMSGrad
    from lightning_async.monitoring.stats import RunStats
    from lightning_async.policies.base import StalenessPolicy
    from lightning_async.runtime.failure import WorkerFailedError
    from lightning_async.strategies.amsgrad import AsyncAMSGradStrategy
    from lightning_async.strategies.simulated_cluster import SimulatedClusterStrategy
    from lightning_async.strategies.simulated_delay import SimulatedDelayStrategy
    from lightning_async.strategies.strategy import AsyncStrategy

__all__ = [
    "AMSGrad",
    "AsyncAMSGradStrategy",
    "AsyncMonitor",
    "AsyncStrategy",
    "RunStats",
    "SimulatedClusterStrategy",
    "SimulatedDelayStrategy",
    "StalenessPolicy",
    "WorkerFailedError",
]
__version__ = "0.1.0"

_HOMES = {
    "AMSGrad": "lightning_async.holder.amsgrad",
    "AsyncAMSGradStrategy": "lightning_async.strategies.amsgrad",
    "AsyncMonitor": "lightning_async.callbacks",
    "AsyncStrategy": "lightning_async.strategies.strategy",
    "RunStats": "lightning_async.monitoring.stats",
    "SimulatedClusterStrategy": "lightning_async.strategies.simulated_cluster",
    "SimulatedDelayStrategy": "lightning_async.strategies.simulated_delay",
    "StalenessPolicy": "lightning_async.policies.base",
    "WorkerFailedError": "lightning_async.runtime.failure",
}


__getattr__ = names_on_demand(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _register(pytorch: Any) -> None:
    registration: Any = importlib.import_module("lightning_async.strategies.registration")
    for name, kind in registration.STRATEGIES.items():
        # By a function: a half imported module of this package may be what imports Lightning.
        registration.register(kind, name, functools.partial(_make, kind), pytorch.strategies.StrategyRegistry)


def _make(kind: str, **arguments: Any) -> Any:
    return __getattr__(kind)(**arguments)


def _explain_to_twin(strategies: ModuleType) -> None:
    twin: Any = importlib.import_module("lightning_async.strategies.twin")
    twin.explain_to_twin(strategies)


when_imported("lightning.pytorch", _register)
when_imported("pytorch_lightning.strategies", _explain_to_twin)
if "lightning.pytorch" in sys.modules:
    # LightningCLI takes a strategy or a callback by its class's name alone, if the class exists.
    for _name in _HOMES:
        __getattr__(_name)
