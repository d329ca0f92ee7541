"""Asynchronous data-parallel training for PyTorch Lightning.

``import lightning_async`` registers the strategies, so that ``Trainer(strategy="async_amsgrad", devices=4)`` works.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_async.amsgrad import AMSGrad
from lightning_async.callback import AsyncMonitor
from lightning_async.failure import WorkerFailedError
from lightning_async.monitor import RunStats
from lightning_async.strategy import AsyncAMSGradStrategy

__all__ = ["AMSGrad", "AsyncAMSGradStrategy", "AsyncMonitor", "RunStats", "WorkerFailedError"]
__version__ = "0.1.0"

AsyncAMSGradStrategy.register_strategies(StrategyRegistry)
