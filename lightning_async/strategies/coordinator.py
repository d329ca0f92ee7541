"""The ranks' strategy from segment to segment: what happens where they meet, and what they agree on there.

`loops/epoch_loop.py` calls these methods.
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

from lightning_async.holder.tally import STEPS
from lightning_async.loops import trainer_state
from lightning_async.loops.buffer_sync import BufferSync, check_averaged, ignored_names, share_module
from lightning_async.loops.phase import Phase, forget_local_results
from lightning_async.loops.tensor_sync import average_unlike
from lightning_async.monitoring.stats import MetricsLogger, RunStats
from lightning_async.strategies.by_hand import Leftover
from lightning_async.strategies.checkpointing import CheckpointedRanks
from lightning_async.strategies.resume import EpochPlace, agree_on_order

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
    _leftover: Leftover
    sigterm_received: bool = False
    requeue: Callable[[], None] | None = None
    _metrics: MetricsLogger | None = None
    # How the ledger deals what is left of the epoch: batches at once, in equal shares or not.
    _dealt: tuple[int, bool] | None = None
    _buffers: BufferSync | None = None

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

    def share_module(self) -> None:
        """Gives every rank rank 0's parameters and buffers before a fit; a collective call.

        Raises:
            MisconfigurationException: if the ranks have built different modules.
        """
        module = self.lightning_module
        assert module is not None
        try:
            check_averaged(module)
            if self.world_size > 1:
                share_module(module, self.gather_objects)
                self._buffers = BufferSync(module, self.gather_objects, self.global_rank)
        except ValueError as error:
            raise MisconfigurationException(f"{self.strategy_name} cannot train this module: {error}.") from error

    def share_buffers(self, batches: int, batches_as_ddp: int) -> None:
        """Gives every rank the same buffers after a segment; a collective call. See `BufferSync.meet`."""
        if self._buffers is not None:
            self._buffers.meet(batches, batches_as_ddp)

    def begin_epoch(
        self, tickets: int, order: str, tickets_done: int, matches: Callable[[str], bool]
    ) -> EpochPlace | None:
        """Fills the ledger with what is left of an epoch; a collective call.

        Args:
            tickets: batches of the epoch over all ranks.
            order: digest of this rank's order of batches; empty for a stream of its own.
            tickets_done: how many a checkpoint's counters say are done, for one that does not say which.
            matches: whether the order that a digest tells of is this one.

        Returns:
            The place that a checkpoint has recorded, if this epoch is resumed from there.

        Raises:
            MisconfigurationException: if the ranks' orders differ.
        """
        assert self._engine is not None
        self._epoch_order = (self._trainer.current_epoch, order)
        agree_on_order(self.gather_objects(order))
        resumed, self._resumed = self._resumed, None
        place = None if resumed is None else resumed.within(self._trainer.current_epoch, matches)
        applied = ((0, tickets_done),) if place is None else place.applied
        self.worker.begin_epoch()
        if self._engine.service is not None:
            self._engine.service.begin_epoch(range(tickets), self.block, applied)
            self._dealt = (self.block, False)
        return place

    def compare_orders(self, digests: list[str]) -> None:
        """Checks that what the ranks have drawn further of a long epoch is one order; a collective call."""
        everyone = self.gather_objects(digests)
        common = min(map(len, everyone))
        agree_on_order(["".join(theirs[:common]) for theirs in everyone])

    @property
    def block(self) -> int:
        """Batches that make one update, which go to one rank; 1 while nobody knows."""
        if self._automatic:
            return int(self._trainer.accumulate_grad_batches)
        return self._hand.group or 1

    @property
    def unfinished_tickets(self) -> int:
        """Batches of this epoch, over all ranks, that are not finished; known on rank 0."""
        assert self._engine is not None and self._engine.service is not None
        return self._engine.service.unfinished()

    @property
    def must_learn_steps(self) -> bool:
        """See `ByHand.must_learn`."""
        return self._hand.must_learn

    @property
    def has_learned_steps(self) -> bool:
        """See `ByHand.has_learned`."""
        return self._hand.has_learned

    @property
    def steps_of_all_ranks(self) -> tuple[int, int]:
        """Steps of all ranks so far, as the trainer counts them, and the most that one block of batches makes."""
        return (self.version, 1) if self._automatic else (self._hand.tally.total(STEPS), self._hand.steps)

    @property
    def stepped_plateaus(self) -> list[Any]:
        """Plateau schedulers that user code has stepped while the ranks trained."""
        return self._hand.schedulers.plateaus

    def restart_step_count(self) -> None:
        """See `ByHand.restart_count`."""
        self._hand.restart_count()

    def enter_asynchronous_phase(self, tickets: int, equal_shares: bool = False) -> None:
        """Opens a segment of ``tickets`` batches over all ranks; a collective call, the last one until it is over.

        Args:
            tickets: how many batches.
            equal_shares: whether every rank gets an equal share of them, also where batches are shared.
        """
        assert self._engine is not None
        counts = self._hand.prepare(self.worker)
        if self._engine.service is not None:
            if counts:
                self._engine.service.set_counts(self._hand.tally.totals)
            dealt = (self.block, equal_shares)
            if dealt != self._dealt and not self._automatic:
                self._engine.service.regroup(*dealt)
            self._dealt = dealt
            self._engine.service.open(tickets)
        if self._metrics is not None:
            self._metrics.restart_clock()
        self.stats.start_segment()
        if self._buffers is not None:
            self._buffers.begin_segment()
        self.barrier("a segment begins")
        self._engine.states.begin_segment()
        Phase.begin_asynchronous()

    def begin_batch(self, samples: int) -> None:
        """Notes that this rank computes a batch; waits for parameters if it holds none."""
        self.worker.begin_batch(samples)
        self._hand.begin_batch()

    def finish_segment(self) -> None:
        """Ends this rank's part of a segment: what is left to push is pushed, and nothing more computed."""
        self._leftover = self._hand.finish_segment(self.worker)
        self.worker.finish_segment()

    def enter_synchronous_phase(self, validation_requested: bool, skip_rest: bool) -> Stop:
        """Waits for all ranks, then gives them the holder's parameters and common decisions."""
        assert self._engine is not None and self.lightning_module is not None
        Phase.end_asynchronous()
        self._engine.states.end_segment()
        forget_local_results()
        trainer = self._trainer
        mine = (trainer.should_stop, self.sigterm_received, validation_requested, skip_rest)
        ranks = self.gather_objects((mine, self._leftover))
        trainer.should_stop, sigterm, validation_requested, skip_rest = (
            any(wish) for wish in zip(*(wishes for wishes, _ in ranks), strict=True)
        )
        self.stats.end_segment()
        if sigterm:
            trainer_state.set_received_sigterm(trainer)
        # Every rank's last push was answered before it came here, so these parameters are final.
        self.worker.refresh()
        self._hand.agree(leftover for _, leftover in ranks)
        if self.world_size > 1:
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
        ignored = ignored_names(self.lightning_module)
        named = self.lightning_module.named_parameters()
        return [parameter for name, parameter in named if id(parameter) not in owned and name not in ignored]

    def save_checkpoints(self, save: Callable[[], None]) -> None:
        """Runs ``save`` on rank 0, as between batches; then all ranks' Checkpoint callbacks note the same.

        A collective call. What came due since a rank's last batch is not the same on all ranks, so rank 0 decides.
        """
        if self.is_global_zero:
            Phase.begin_asynchronous()
            try:
                save()
            finally:
                Phase.end_asynchronous()
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
