"""The exchange: each rank's worker, the service on rank 0 that all workers push to, and what brings them together.

An `Engine` is one rank's part of it.
"""

from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.worker import Worker

__all__ = ["Engine", "ExchangeOptions", "Worker"]
