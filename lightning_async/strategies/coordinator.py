"""What happens where the ranks meet: between two segments of asynchronous training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_async.exchange.worker import Worker
from lightning_async.holder.layout import all_parameters
from lightning_async.loops import protocols, trainer_state
from lightning_async.loops.buffer_sync import BufferSync, ignored_names
from lightning_async.loops.joining import TrainerState
from lightning_async.loops.metric_sync import MetricSync
from lightning_async.loops.phase import Phase
from lightning_async.loops.progress_bar import say
from lightning_async.loops.protocols import Collectives, SegmentEnd
from lightning_async.loops.tensor_sync import average_unlike
from lightning_async.monitoring.cpu_use import CpuMeter, CpuUse
from lightning_async.monitoring.metrics import MetricsLogger
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.process_groups import time_all_reduce
from lightning_async.strategies.by_hand import ByHand, Leftover
from lightning_async.strategies.checkpointing import Checkpointing
from lightning_async.strategies.clock import SharedClock
from lightning_async.strategies.gradient_exchange import GradientExchange
from lightning_async.strategies.joining import Joining, capture_fit
from lightning_async.strategies.resolved import BatchSource
from lightning_async.strategies.resume import EpochPlace, agree_on_order
from lightning_async.strategies.snapshots import Snapshots
from lightning_async.strategies.supervisor import RunSupervisor

__all__ = ["Coordinator"]


class Coordinator(protocols.Coordinator):
    """Lets the ranks of one fit part for a segment, and brings them together after it.

    Args:
        trainer: the trainer.
        collectives: the strategy's own.
        phase: the run's phase.
        exchange: this rank's part of the exchange.
        clock: the counts that all ranks share.
        by_hand: what user code does by hand.
        checkpointing: knows where in an epoch a checkpoint was saved.
        stats: statistics of the run, collected on rank 0.
        metrics: logs the ``async/`` metrics, on rank 0; None without a logger.
        metric_sync: torchmetrics in phases.
        buffers: the module's buffers from meeting to meeting; None with one rank.
        sigterm_received: whether this rank was told to end gracefully.
        supervisor: told when the ranks train.
        joining: this rank's way into a fit that is under way; None of one that begins with it.
        on_joined: called when it is in.
        snapshots: those of the run, on rank 0; None elsewhere, or if there are none.
        resolve: told where the batches come from; tells how the run exchanges gradients, for the loggers.
    """

    def __init__(
        self,
        trainer: Trainer,
        collectives: Collectives,
        phase: Phase,
        exchange: GradientExchange,
        clock: SharedClock,
        by_hand: ByHand,
        checkpointing: Checkpointing,
        stats: RunStats,
        metrics: MetricsLogger | None,
        metric_sync: MetricSync,
        buffers: BufferSync | None,
        sigterm_received: Callable[[], bool],
        supervisor: RunSupervisor,
        joining: Joining | None,
        on_joined: Callable[[], None],
        snapshots: Snapshots | None,
        resolve: Callable[[BatchSource], dict[str, Any]],
    ) -> None:
        self._trainer = trainer
        self._collectives = collectives
        self._phase = phase
        self._exchange = exchange
        self._clock = clock
        self._by_hand = by_hand
        self._checkpointing = checkpointing
        self._stats = stats
        self._metrics = metrics
        self._metric_sync = metric_sync
        self._buffers = buffers
        self._sigterm_received = sigterm_received
        self._cpu = CpuMeter()
        self._supervisor = supervisor
        self._joining = joining
        self._on_joined = on_joined
        self._snapshots = snapshots
        self._resolve = resolve
        self._is_resolved = False
        self._source: BatchSource = "shared order"
        # Ends the asynchronous phase.
        self._segment = ExitStack()
        # Digest of the epoch's order of batches.
        self._order = ""
        # How the ledger deals what is left of the epoch: batches at once, in equal shares or not.
        self._dealt: tuple[int, bool] | None = None

    # --- what the loops ask ------------------------------------------------------------------------------------------

    @property
    @override
    def clock(self) -> SharedClock:
        return self._clock

    @property
    @override
    def batches(self) -> Worker:
        return self._exchange.worker

    @property
    @override
    def unfinished_tickets(self) -> int:
        service = self._exchange.engine.service
        assert service is not None
        return service.unfinished()

    @property
    @override
    def stepped_plateaus(self) -> list[Any]:
        return self._by_hand.schedulers.plateaus

    @property
    @override
    def snapshot_between_batches(self) -> tuple[protocols.Snapshot, int] | None:
        return self._checkpointing.snapshot_between_batches

    @property
    @override
    def steps_to_measure(self) -> int | None:
        return self._exchange.dial.steps_to_measure

    # --- an epoch begins ---------------------------------------------------------------------------------------------

    @override
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
        agree_on_order(self._collectives.gather_objects(order))
        self._order = order
        if not self._is_resolved:
            self._is_resolved = True
            self._source = "shared order" if order else "stream per rank"
            self._configure_metrics()
        place = self._checkpointing.begin_epoch(self._trainer.current_epoch, order, matches)
        applied = ((0, tickets_done),) if place is None else place.applied
        self._exchange.worker.begin_epoch()
        service = self._exchange.engine.service
        if service is not None:
            service.begin_epoch(range(tickets), self._clock.block, applied)
            self._dealt = (self._clock.block, False)
        return place

    @override
    def compare_orders(self, digests: list[str]) -> None:
        everyone = self._collectives.gather_objects(digests)
        common = min(map(len, everyone))
        agree_on_order(["".join(theirs[:common]) for theirs in everyone])

    def _configure_metrics(self) -> None:
        configuration = self._resolve(self._source)
        if self._metrics is not None:
            self._metrics.configure(configuration)

    # --- the ranks part ----------------------------------------------------------------------------------------------

    @override
    def enter_segment(self, tickets: int, equal_shares: bool = False) -> None:
        """Opens a segment of ``tickets`` batches over all ranks; a collective call, the last one until it is over.

        Args:
            tickets: how many batches.
            equal_shares: whether every rank gets an equal share of them, also where batches are shared.
        """
        self._exchange.follow_user_code()
        # Rank 0 deals the segment's tickets.
        counted = self._by_hand.prepare(self._exchange.worker)
        engine = self._exchange.engine
        if engine.service is not None:
            if counted:
                engine.service.set_counts(self._by_hand.tally.totals)
            dealt = (self._clock.block, equal_shares)
            if dealt != self._dealt and self._by_hand.manual:
                engine.service.regroup(*dealt)
            self._dealt = dealt
            engine.service.open(tickets, self._supervisor.ranks)
            if self._snapshots is not None:
                self._snapshots.begin_segment(engine.service)
        # Every rank notes where it stands.
        if self._metrics is not None:
            self._metrics.begin(self._clock.log_step - 1)
        self._stats.start_segment()
        if self._buffers is not None:
            self._buffers.begin_segment()
        # The last time that they wait for one another.
        self._collectives.barrier("a segment begins")
        self._supervisor.begin_training()
        self._part()

    def _part(self) -> None:
        self._cpu.start()
        self._exchange.engine.states.begin_segment()
        self._segment.enter_context(self._phase.asynchronous())

    @property
    @override
    def may_leave(self) -> bool:
        return self._collectives.outlives_ranks and not self._trainer.is_global_zero

    @override
    def leave_run(self) -> None:
        # Its last push is answered; what is drawn beyond that goes back with its leases.
        self._exchange.worker.settle()
        self._supervisor.membership.leave("it was told to end (SIGTERM)")
        raise SystemExit(0)

    @override
    def open_admission(self) -> None:
        if (admission := self._supervisor.admission) is not None:
            admission.open(capture_fit(self._trainer, self._order, self._exchange, self._by_hand))

    @property
    @override
    def joins(self) -> bool:
        return self._joining is not None and self._supervisor.membership.joining is not None

    @override
    def take_state(self) -> bool:
        assert self._joining is not None
        return self._joining.take_state()

    @override
    def join_segment(self, order: str) -> TrainerState:
        joining = self._joining
        assert joining is not None and joining.state is not None
        agree_on_order([joining.state.order, order])
        if not order and self._supervisor.membership.rank >= self._collectives.nominal_world_size:
            raise MisconfigurationException(
                "Each rank of this run has a train loader of its own, whose samples are the ranks' that the run began "
                "with: a further one would repeat them. Let the ranks share a map-style dataset."
            )
        self._exchange.worker.begin_epoch()
        self._by_hand.prepare(self._exchange.worker)
        if self._buffers is not None:
            self._buffers.begin_segment()
        joining.come_in()
        self._on_joined()
        self._part()
        return joining.state.trainer

    @override
    def begin_batch(self, samples: int) -> None:
        self._exchange.worker.begin_batch(samples)
        self._by_hand.begin_batch()

    @override
    def take_snapshot(self) -> None:
        if self._snapshots is not None:
            self._snapshots.take_if_due()

    # --- the ranks meet ----------------------------------------------------------------------------------------------

    @override
    def leave_segment(self, validation_requested: bool, skip_rest: bool) -> SegmentEnd:
        # This rank's part ends: what is left to push is pushed, and nothing more computed.
        worker, trainer = self._exchange.worker, self._trainer
        if self._supervisor.admission is not None:
            self._supervisor.admission.shut()
        leftover = self._by_hand.finish_segment(worker)
        worker.finish_segment()
        if self._snapshots is not None:
            self._snapshots.end_segment()
        self.abandon_segment()
        self._exchange.engine.states.end_segment()
        self._metric_sync.forget_local_results()
        # All ranks tell what they want and what they have left; then they know the same.
        # A rank that may leave alone does so at its next batch.
        told_to_end = self._sigterm_received() and not self.may_leave
        wishes = (trainer.should_stop, told_to_end, validation_requested, skip_rest)
        mine = (wishes, leftover, self._cpu.stop(), self._stats.all_reduce_seconds > 0)
        ranks: list[tuple[tuple[bool, ...], Leftover, CpuUse, bool]] = self._collectives.gather_objects(mine)
        # Who has come to this meeting: fewer may come to the next.
        present = self._collectives.ranks_present
        trainer.should_stop, sigterm, validation_requested, skip_rest = (
            any(wish) for wish in zip(*(wishes for wishes, *_ in ranks), strict=True)
        )
        self._stats.end_segment()
        self._collectives.follow_roster()
        if trainer.world_size > 1 and not ranks[0][-1]:
            self._collectives.repeat_if_lost(self._time_all_reduce, lambda: None)
        self._stats.note_cpu_use({rank: use for rank, (_, _, use, _) in zip(present, ranks, strict=True)})
        if sigterm:
            trainer_state.set_received_sigterm(trainer)
        # Rank 0 tells what became of the tickets, and what the holder's steps have changed in the param groups.
        service = self._exchange.engine.service
        (done, left), adapted = self._collectives.broadcast(
            ((0, 0), []) if service is None else (service.progress(), service.take_adapted())
        )
        # Every rank's last push was answered before it came here, so these parameters are final.
        worker.refresh()
        averages = self._exchange.averages
        has_chosen = self._choose()
        # But for gradients that wait for more, where none will follow; all ranks know the same of that.
        if averages and (not left or skip_rest or self._is_over() or has_chosen):
            self._exchange.engine.show_adapted(adapted)
            if service is not None:
                service.complete_version()
            adapted = self._collectives.broadcast([] if service is None else service.take_adapted())
            worker.refresh()
        if has_chosen:
            self._exchange.follow_dial(worker.version)
            self._configure_metrics()
        self._by_hand.agree(leftover for _, leftover, *_ in ranks)
        if trainer.world_size > 1:
            average_unlike(self._parameters_of_no_optimizer())
        self._exchange.engine.show_adapted(adapted)
        return SegmentEnd(done, left, validation_requested, skip_rest)

    def _time_all_reduce(self) -> None:
        # DDP makes one in each step: what lock step would take is estimated with it.
        elements = self._exchange.engine.layout.numel
        self._stats.all_reduce_seconds = time_all_reduce(elements, self._trainer.strategy.root_device)

    def _choose(self) -> bool:
        """Lets rank 0 choose what was left to "auto", once enough was measured; a collective call.

        Returns:
            Whether it has chosen; what is in force at the holder follows.
        """
        dial = self._exchange.dial
        if dial.steps_to_measure is None or self._is_over():
            return False
        mine = dial.choose() if self._trainer.is_global_zero else None
        dial.choice, dial.rounds = self._collectives.broadcast((mine, dial.rounds))
        if dial.notice is None:
            return False
        say(self._trainer, dial.notice)
        return True

    def _is_over(self) -> bool:
        """Whether the fit ends here, as far as is known."""
        reached = self._trainer.max_steps != -1 and self._clock.step >= self._trainer.max_steps
        return self._trainer.should_stop or reached

    def abandon_segment(self) -> None:
        """Ends the asynchronous phase, if it has begun."""
        self._segment.close()

    def _parameters_of_no_optimizer(self) -> list[Tensor]:
        """What the holder does not have: frozen layers, and what user code moves, such as a momentum encoder."""
        module = self._trainer.lightning_module
        owned = {id(parameter) for optimizer in self._trainer.optimizers for parameter in all_parameters(optimizer)}
        ignored = ignored_names(module)
        named = module.named_parameters()
        return [parameter for name, parameter in named if id(parameter) not in owned and name not in ignored]

    @override
    def share_buffers(self, batches: int, batches_as_ddp: int) -> None:
        if self._buffers is not None:
            self._buffers.meet(batches, batches_as_ddp)

    @override
    def save_on_rank_zero(self, save: Callable[[], None]) -> None:
        """Runs ``save`` on rank 0, as between batches; then all ranks' Checkpoint callbacks note the same.

        A collective call. What came due since a rank's last batch is not the same on all ranks, so rank 0 decides.
        """
        if self._trainer.is_global_zero:
            with self._phase.asynchronous():
                save()
        fields = self._collectives.broadcast(trainer_state.checkpoint_fields(self._trainer))
        trainer_state.set_checkpoint_fields(self._trainer, fields)

    @override
    def log_metrics(self, step: int) -> None:
        if self._metrics is not None:
            service = self._exchange.engine.service
            assert service is not None
            service.settle()
            self._metrics.log(self._exchange.worker.version, step, self._trainer.current_epoch)

    def finish_metrics(self) -> None:
        """Writes the last row of the metrics and the run's final numbers, on rank 0; no collective."""
        if self._metrics is not None:
            step = max(0, self._clock.log_step - 1)
            self._metrics.finish(self._exchange.worker.version, step, self._trainer.current_epoch)
