"""The ranks' strategy from segment to segment: what happens where they meet, and what they agree on there.

Below `strategy.py`; above `checkpoints.py`. `internals/epochs.py` calls these methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.buffers import average_buffers, average_unlike
from lightning_async.checkpoints import CheckpointedRanks
from lightning_async.internals import trainer_state
from lightning_async.monitor import MetricsLogger, RunStats
from lightning_async.phases import Phase, forget_local_results
from lightning_async.resume import EpochPlace, agree_on_order

__all__ = ["SegmentedRanks", "Stop"]


@dataclass(frozen=True, slots=True)
class Stop:
    """What all ranks know when they have met at the end of a segment.

    Args:
        tickets_done: batches of this epoch that are applied.
        tickets_left: batches of this epoch that nobody was handed.
        validation_requested: a rank asked for validation now.
        skip_rest: a rank wants to skip the rest of the epoch.
    """

    tickets_done: int
    tickets_left: int
    validation_requested: bool
    skip_rest: bool


class SegmentedRanks(CheckpointedRanks):
    """Ranks that train asynchronously in segments and meet between them.

    Attributes:
        stats: statistics of the run, collected on rank 0; set by the subclass.
        sigterm_received: whether this rank was told to end gracefully.
        requeue: saves and requeues the job, once SLURM has asked for it.
    """

    stats: RunStats
    sigterm_received: bool = False
    requeue: Callable[[], None] | None = None
    _metrics: MetricsLogger | None = None

    @property
    @override
    def optimizers(self) -> list[Optimizer]:
        return super().optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        if Phase.asynchronous:
            raise MisconfigurationException(
                "the optimizers were replaced between two batches, while the other ranks train with those of before. "
                "Replace them where the ranks meet, for example in on_train_epoch_start, on_validation_end or "
                "on_train_epoch_end: the new ones are in force from the next batch."
            )
        own = [each.optimizer if isinstance(each, LightningOptimizer) else each for each in optimizers]
        assign: Any = Strategy.optimizers.fset  # type: ignore[attr-defined]  # a property is a function to mypy
        assign(self, own)

    def begin_epoch(self, tickets: int, order: str, tickets_done: int) -> EpochPlace | None:
        """Fills the ledger with what is left of an epoch; a collective call.

        Args:
            tickets: batches of the epoch over all ranks.
            order: digest of this rank's order of batches; empty for a stream of its own.
            tickets_done: how many a checkpoint's counters say are done, for one that does not say which.

        Returns:
            The place that a checkpoint has recorded, if this epoch is resumed from there.

        Raises:
            MisconfigurationException: if the ranks' orders differ.
        """
        assert self._engine is not None
        self._epoch_order = (self._trainer.current_epoch, order)
        agree_on_order(self.gather_objects(order))
        resumed, self._resumed = self._resumed, None
        place = None if resumed is None else resumed.within(*self._epoch_order)
        applied = ((0, tickets_done),) if place is None else place.applied
        if self._engine.service is not None:
            block = self._trainer.accumulate_grad_batches if self._automatic else 1
            self._engine.service.begin_epoch(range(tickets), int(block), applied)
        return place

    @property
    def unfinished_tickets(self) -> int:
        """Batches of this epoch, over all ranks, that are not finished; known on rank 0."""
        assert self._engine is not None and self._engine.service is not None
        return self._engine.service.unfinished()

    def enter_asynchronous_phase(self, tickets: int) -> None:
        """Opens a segment of ``tickets`` batches over all ranks; a collective call, the last one until it is over."""
        assert self._engine is not None
        if self._engine.service is not None:
            self._engine.service.open(tickets)
        if self._metrics is not None:
            self._metrics.restart_clock()
        self.stats.start_segment()
        self.barrier("a segment begins")
        self._engine.states.begin_segment()
        Phase.asynchronous = True

    def enter_synchronous_phase(self, validation_requested: bool, skip_rest: bool) -> Stop:
        """Waits for all ranks, then gives them the holder's parameters, common buffers and common decisions."""
        assert self._engine is not None and self.lightning_module is not None
        Phase.asynchronous = False
        self._engine.states.end_segment()
        forget_local_results()
        trainer = self._trainer
        wishes = self.gather_objects((trainer.should_stop, self.sigterm_received, validation_requested, skip_rest))
        trainer.should_stop, sigterm, validation_requested, skip_rest = (
            any(wish) for wish in zip(*wishes, strict=True)
        )
        self.stats.end_segment()
        if sigterm:
            trainer_state.set_received_sigterm(trainer)
        # Every rank's last push was answered before it came here, so these parameters are final.
        self.worker.refresh()
        if self.world_size > 1:
            average_buffers(self.lightning_module)
            average_unlike(self._parameters_of_no_optimizer())
        service = self._engine.service
        (done, left), adapted = self.broadcast(
            ((0, 0), []) if service is None else (service.progress(), service.take_adapted())
        )
        self._engine.show_adapted(adapted)
        return Stop(done, left, validation_requested, skip_rest)

    def _parameters_of_no_optimizer(self) -> list[Tensor]:
        """What the holder does not have: frozen layers, and what user code moves, such as a momentum encoder."""
        assert self.lightning_module is not None
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        owned = {id(parameter) for group in groups for parameter in group["params"]}
        return [parameter for parameter in self.lightning_module.parameters() if id(parameter) not in owned]

    def save_checkpoints(self, save: Callable[[], None]) -> None:
        """Runs ``save`` on rank 0, as between batches; then all ranks' Checkpoint callbacks note the same.

        A collective call. What came due since a rank's last batch is not the same on all ranks, so rank 0 decides.
        """
        if self.is_global_zero:
            Phase.asynchronous = True
            try:
                save()
            finally:
                Phase.asynchronous = False
        fields = self.broadcast(trainer_state.checkpoint_fields(self._trainer))
        trainer_state.set_checkpoint_fields(self._trainer, fields)

    def requeue_if_asked(self) -> None:
        """Does what SLURM has asked for, between two batches.

        In the signal's handler it would save in the middle of an update, whose lock this very thread may hold.
        """
        requeue, self.requeue = self.requeue, None
        if requeue is not None:
            requeue()

    def raise_sigterm(self) -> None:
        """Leaves the fit after a SIGTERM that all ranks have agreed on."""
        raise SIGTERMException

    @property
    def _automatic(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.automatic_optimization
