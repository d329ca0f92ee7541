"""torchmetrics in phases: a metric gathers over the ranks in the synchronous phase only."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric

from lightning_async.loops.patching import set_until_closed
from lightning_async.loops.phase import Phase
from lightning_async.loops.protocols import Collectives

__all__ = ["MetricSync"]


class MetricSync:
    """Lets torchmetrics synchronise in the synchronous phase only.

    ``Metric.compute`` gathers over the default process group past the strategy. In a training step, where every rank
    is somewhere else, it would wait for ever. Of whichever metric: a callback's are as well as the module's. So the
    method is replaced on the class, for the whole process.

    Args:
        phase: the run's phase.
        collectives: the strategy's own.
    """

    def __init__(self, phase: Phase, collectives: Collectives) -> None:
        self._phase = phase
        self._collectives = collectives
        # By identity: torchmetrics hash a metric by its states.
        self._computed_locally: dict[int, weakref.ref[Metric]] = {}

    def install(self, undo: ExitStack) -> None:
        """Replaces ``Metric.sync`` until ``undo`` is closed."""
        own, phase, computed_locally = Metric.sync, self._phase, self._computed_locally
        collectives = self._collectives

        def sync(
            metric: Metric,
            dist_sync_fn: Callable[..., Any] | None = None,
            process_group: Any | None = None,
            should_sync: bool = True,
            distributed_available: Callable[..., Any] | None = None,
        ) -> None:
            if not phase.is_asynchronous and should_sync and collectives.outlives_ranks:
                arguments = (dist_sync_fn, process_group, should_sync, distributed_available)
                collectives.repeat_if_lost(lambda: own(metric, *arguments), lambda: _undo(metric))
            elif not phase.is_asynchronous:
                own(metric, dist_sync_fn, process_group, should_sync, distributed_available)
            elif should_sync:
                if metric.dist_sync_on_step:
                    _warn_of_local_steps()
                computed_locally[id(metric)] = weakref.ref(metric)

        set_until_closed(undo, Metric, "sync", sync)
        undo.callback(computed_locally.clear)

    def forget_local_results(self) -> None:
        """Makes metrics that were computed in a training step compute anew, with the other ranks.

        A metric keeps its result until it is updated. This rank's alone is not the epoch's, and a rank that has it
        would not meet those that do not.
        """
        for reference in self._computed_locally.values():
            metric = reference()
            if metric is not None:
                metric._computed = None
        self._computed_locally.clear()


def _undo(metric: Metric) -> None:
    """Gives a metric its own states back, if it has those of all ranks."""
    if metric._is_synced:
        metric.unsync()


@functools.cache
def _warn_of_local_steps() -> None:
    rank_zero_warn(
        "The ranks are not at the same batch while they train asynchronously, so a metric with dist_sync_on_step=True "
        "gives each rank its own value of a step. What it computes where the ranks meet is over all of them."
    )
