"""What Lightning sees of the package: the strategies, and the parts of a run and of a fit that they are made of.

The names are looked up when they are first used: `registration` is imported while Lightning is.
"""

from typing import TYPE_CHECKING

from lightning_async.on_demand import names_on_demand

if TYPE_CHECKING:
    from lightning_async.strategies.amsgrad import AsyncAMSGradStrategy
    from lightning_async.strategies.simulated_delay import SimulatedDelayStrategy
    from lightning_async.strategies.strategy import AsyncStrategy

__all__ = ["AsyncAMSGradStrategy", "AsyncStrategy", "SimulatedDelayStrategy"]

__getattr__ = names_on_demand(
    __name__,
    {
        "AsyncAMSGradStrategy": "lightning_async.strategies.amsgrad",
        "AsyncStrategy": "lightning_async.strategies.strategy",
        "SimulatedDelayStrategy": "lightning_async.strategies.simulated_delay",
    },
)
