"""Which phase this process is in: asynchronous (train batches) or synchronous (everything else).

Process-wide, like ``torch.distributed``'s default group whose use it governs. Used by `strategy.py` and `loops.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available

__all__ = ["Phase", "keep_metrics_local"]


class Phase:
    """The current phase; `asynchronous` is set by the strategy alone."""

    asynchronous = False


def collectives_allowed() -> bool:
    """Whether a metric may synchronise over the ranks now."""
    return not Phase.asynchronous and jit_distributed_available()


def keep_metrics_local(modules: Iterable[nn.Module]) -> None:
    """Lets torchmetrics synchronise in the synchronous phase only.

    ``Metric.compute`` gathers over the default process group past the strategy. In a training step, where every rank
    is somewhere else, it would wait for ever.
    """
    for module in modules:
        if isinstance(module, Metric) and module.distributed_available_fn is jit_distributed_available:
            # A module-level function, so that a module that holds the metric can still be copied and pickled.
            module.distributed_available_fn = collectives_allowed
