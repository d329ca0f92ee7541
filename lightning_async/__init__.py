"""Asynchronous data-parallel training for PyTorch Lightning.

``import lightning_async`` registers the strategies, so that ``Trainer(strategy="async_amsgrad", devices=4)`` works.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_async.amsgrad import AMSGrad
from lightning_async.amsgrad_strategy import AsyncAMSGradStrategy
from lightning_async.callback import AsyncMonitor
from lightning_async.failure import WorkerFailedError
from lightning_async.internals.twin import explain_to_twin
from lightning_async.monitor import RunStats
from lightning_async.simulated_delay import SimulatedDelayStrategy
from lightning_async.strategy import AsyncStrategy

__all__ = [
    "AMSGrad",
    "AsyncAMSGradStrategy",
    "AsyncMonitor",
    "AsyncStrategy",
    "RunStats",
    "SimulatedDelayStrategy",
    "WorkerFailedError",
]
__version__ = "0.1.0"

for _strategy in (AsyncAMSGradStrategy, AsyncStrategy):
    _strategy.register_strategies(StrategyRegistry)
explain_to_twin(name for name in StrategyRegistry if name.startswith("async"))
