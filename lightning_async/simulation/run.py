"""An optimizer's training in a virtual cluster: reads, gradients on their way, stops, and what a checkpoint keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import exchanged_parameters
from lightning_async.holder.optimizer_state import OptimizerStates, state_by_place
from lightning_async.holder.types import Push, Update
from lightning_async.monitoring.rejections import RejectionNotices
from lightning_async.monitoring.stats import RunStats
from lightning_async.policies.base import StalenessPolicy
from lightning_async.simulation.cluster import ExchangeTimes, Progress, VirtualCluster
from lightning_async.simulation.held import HolderSink
from lightning_async.simulation.step_times import StepTimes

__all__ = ["ClusterRun"]

log = logging.getLogger(__name__)


class ClusterRun:
    """Trains one optimizer's parameters in a virtual cluster.

    Between two gradients the module has the holder's newest parameters, which the next worker to read will get. A
    stretch of training ends with `settle`, as the segment of a real run does.

    Args:
        optimizer: the module's; from here on the holder has its state, and it shows that.
        barrier: of the cluster.
        steps: how long each worker's steps take.
        times: what an exchange takes.
        stats: collects what happens.
        progress: where to go on from; taken over.
        gathered: gradients that wait for more, from a checkpoint; None if there are none.
        policy: what is done with a gradient because of its age, bound to the cluster.
        momentum_rule: what becomes of the optimizer's momentum; None if it stays.
        learned: what the policy has learned, from a checkpoint.
        max_rejected: gradients in a row that are not finite with which a worker fails; None applies them.

    Attributes:
        is_training: whether a stretch of training is under way.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        barrier: StalenessBarrier,
        steps: StepTimes,
        times: ExchangeTimes,
        stats: RunStats,
        progress: Progress,
        gathered: Gathered | None = None,
        policy: StalenessPolicy | None = None,
        momentum_rule: Callable[[float], float] | None = None,
        learned: Mapping[str, Any] | None = None,
        max_rejected: int | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._stats = stats
        self._rejections = RejectionNotices()
        self._built_for = _identity(optimizer)
        self._hyperparams = HyperparamLayout(optimizer)
        self._parameters = exchanged_parameters(optimizer)
        state = state_by_place(optimizer) or None
        held = (state, gathered, policy, momentum_rule, learned, max_rejected)
        self._sink = HolderSink(optimizer, barrier, self._observe, *held)
        self._holder = self._sink.holder
        self._cluster = VirtualCluster(steps, self._sink, times, progress)
        self._states = OptimizerStates(
            [optimizer], lambda index: self._holder.optimizer_state(index), lambda: self._holder.version
        )
        self.is_training = False
        # While the run stands in the middle of an update's batches: the parameters that its worker has read.
        self._read: list[Tensor] | None = None
        self._batches = 0

    @property
    def version(self) -> int:
        """Updates made so far."""
        return self._holder.version

    def _observe(self, update: Update) -> None:
        self._stats.record(update)
        if update.rejected and (line := self._rejections.line(update)) is not None:
            log.warning("lightning_async: %s", line)

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is the optimizer that this was built for, with the same parameters in the same groups."""
        return _identity(optimizer) == self._built_for

    # --- one update ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_batch(self) -> None:
        """Lets the next worker read, unless one computes already; the module has what it has read."""
        if not self.is_training:
            self._begin_stretch()
        elif self._cluster.computing is None:
            self._sink.follow()
        if self._cluster.computing is None:
            self._cluster.read()
            self._sink.install_answer()

    def push(self, batches: int, samples: int) -> None:
        """Sends the module's gradients on their way, and gives it the newest parameters.

        Args:
            batches: of which they are made.
            samples: number of samples in them.
        """
        self._states.check_untouched()
        worker = self._cluster.computing
        assert worker is not None
        gradients = [parameter.grad for parameter in self._parameters]
        groups = self._hyperparams.read(self._optimizer.param_groups)
        tickets = (range(self._batches, self._batches + batches),)
        self._sink.stash(Push(worker, 0, self._cluster.version_read, gradients, groups, tickets, samples))
        self._leave(batches, has_gradient=True)

    def skip(self, batches: int) -> None:
        """Goes on without a gradient: there was no loss, or it was not finite.

        Args:
            batches: that the worker has computed in vain.
        """
        self._leave(batches, has_gradient=False)

    def _leave(self, batches: int, has_gradient: bool) -> None:
        self._batches += batches
        self._cluster.computed(batches, has_gradient)
        self._cluster.advance()
        self._sink.install()

    # --- stops --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin_stretch(self) -> None:
        # What user code has done meanwhile is the holder's.
        self._sink.follow()
        self._holder.load_states(self._states.changes())
        self._states.begin_segment()
        self._stats.start_segment()
        self._cluster.start()
        self.is_training = True
        # The batches of one update are computed at the same parameters.
        if self._read is not None:
            torch._foreach_copy_(self._parameters, self._read)
            self._read = None

    def settle(self, is_last: bool = False) -> None:
        """Lets everything under way arrive; the module has the newest parameters then.

        Args:
            is_last: whether no gradient will come to complete a version.
        """
        if not self.is_training:
            return
        self.is_training = False
        if self._cluster.computing is None:
            self._sink.follow()
        else:
            self._read = [parameter.detach().clone() for parameter in self._parameters]
        self._cluster.settle()
        if is_last:
            self.complete()
        self._sink.install()
        for group, adapted in zip(self._optimizer.param_groups, self._holder.take_adapted()[0], strict=True):
            group.update(adapted)
        self._stats.end_segment()
        self._states.end_segment()

    def complete(self) -> None:
        """Makes an update of the gradients that wait for more, unless a worker computes; nothing may be under way."""
        if self._cluster.computing is None and self._holder.complete_version():
            self._sink.install()

    def abandon(self) -> None:
        """Forgets a worker that has read and whose gradient will not come."""
        if self._cluster.computing is not None:
            self._sink.install()
        self._cluster.abandon()
        self._read = None

    def release(self) -> None:
        """Gives the optimizer a state of its own again."""
        self._states.release(self._holder.optimizer_state, "the state is the holder's")

    def gathered(self) -> Gathered | None:
        """The gradients that wait for more; None if there are none."""
        return self._holder.snapshot().gathered

    def learned(self) -> Mapping[str, Any] | None:
        """What the policy has learned, with its class; None if it learns nothing."""
        return self._holder.snapshot().policy


def _identity(optimizer: torch.optim.Optimizer) -> tuple[int, list[list[int]]]:
    return id(optimizer), [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
