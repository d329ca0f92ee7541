"""Which phase this process is in: asynchronous (train batches) or synchronous (everything else).

Process-wide, like ``torch.distributed``'s default group whose use it governs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric

from lightning_async.loops.collective_guard import allow_collectives, refuse_collectives

__all__ = ["Phase", "forget_local_results", "keep_metrics_local", "release_metrics"]


class Phase:
    """The current phase, which the strategy alone changes.

    Attributes:
        asynchronous: whether ranks train asynchronously now. Collectives of user code are errors then.
    """

    asynchronous = False

    @classmethod
    def begin_asynchronous(cls) -> None:
        """Begins the asynchronous phase; idempotent."""
        cls.asynchronous = True
        refuse_collectives()

    @classmethod
    def end_asynchronous(cls) -> None:
        """Ends the asynchronous phase; idempotent."""
        cls.asynchronous = False
        allow_collectives()


def keep_metrics_local() -> None:
    """Lets torchmetrics synchronise in the synchronous phase only, until `release_metrics`.

    ``Metric.compute`` gathers over the default process group past the strategy. In a training step, where every rank
    is somewhere else, it would wait for ever. Of whichever metric: a callback's are as well as the module's.
    """
    kind: Any = Metric
    kind.sync = _sync_between_segments


def release_metrics() -> None:
    """Undoes `keep_metrics_local`."""
    kind: Any = Metric
    kind.sync = _sync
    _computed_locally.clear()


def forget_local_results() -> None:
    """Makes metrics that were computed in a training step compute anew, with the other ranks.

    A metric keeps its result until it is updated. This rank's alone is not the epoch's, and a rank that has it would
    not meet those that do not.
    """
    for reference in _computed_locally.values():
        metric = reference()
        if metric is not None:
            metric._computed = None
    _computed_locally.clear()


@functools.cache
def _warn_of_local_steps() -> None:
    rank_zero_warn(
        "The ranks are not at the same batch while they train asynchronously, so a metric with dist_sync_on_step=True "
        "gives each rank its own value of a step. What it computes where the ranks meet is over all of them."
    )


_sync = Metric.sync
# By identity: torchmetrics hash a metric by its states.
_computed_locally: dict[int, weakref.ref[Metric]] = {}


def _sync_between_segments(
    metric: Metric,
    dist_sync_fn: Callable[..., Any] | None = None,
    process_group: Any | None = None,
    should_sync: bool = True,
    distributed_available: Callable[..., Any] | None = None,
) -> None:
    if not Phase.asynchronous:
        _sync(metric, dist_sync_fn, process_group, should_sync, distributed_available)
    elif should_sync:
        if metric.dist_sync_on_step:
            _warn_of_local_steps()
        _computed_locally[id(metric)] = weakref.ref(metric)
