"""An epoch in segments: batches until no ticket is left, then all ranks meet, agree, and go on as Lightning does.

Lightning's own epoch loop runs a collective before every batch and ends an epoch by counting local batches; either
would put the ranks in lock step or leave one of them waiting. The subclass below replaces exactly that.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from typing import Any

from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_async.data.epoch_plan import EpochPlan, log_position, tickets_until
from lightning_async.loops.checkpoint_interval import save_passed
from lightning_async.loops.counters import count_as_ddp, rewrite_as_ddp
from lightning_async.loops.epoch_size import epoch_size
from lightning_async.loops.epoch_state import EpochState, EpochStop, Stage
from lightning_async.loops.fetcher import TicketFetcher
from lightning_async.loops.joining import restore_epoch
from lightning_async.loops.optimization import flush_accumulated_gradients, share_plateaus
from lightning_async.loops.progress_bar import show_progress
from lightning_async.loops.protocols import Collectives, Coordinator, RunSignals
from lightning_async.loops.results import align_results
from lightning_async.loops.validation import validate_whole
from lightning_async.loops.weight_averaging import share_averages

__all__ = ["AsyncEpochLoop"]


class AsyncEpochLoop(_TrainingEpochLoop):
    """One epoch, in segments of asynchronous training between synchronous stops."""

    # Given to Lightning's own loop with this class, by `install`.
    _epoch: EpochState
    _collectives: Collectives
    _signals: RunSignals
    # Known once a fit is set up.
    _fit_coordinator: Coordinator | None

    @property
    def _coordinator(self) -> Coordinator:
        assert self._fit_coordinator is not None
        return self._fit_coordinator

    @property
    def _ranks(self) -> int:
        """N: the number of ranks that the run was started with, whoever is lost since."""
        return self._collectives.nominal_world_size

    @property
    def global_step(self) -> int:
        """The global clock: updates per rank, k // N."""
        return super().global_step if self._fit_coordinator is None else self._fit_coordinator.clock.step

    @property
    def batch_idx(self) -> int:
        """This rank's count of batches, or the shared clock's while a scheduler is stepped."""
        if self._epoch.scheduled_batch is not None:
            return self._epoch.scheduled_batch
        return super().batch_idx

    @property
    def _batches_started(self) -> int:
        """Batches of this epoch that this rank has computed, or is computing."""
        current: Any = self.batch_progress.current
        return int(current.started)

    @property
    def done(self) -> bool:
        """Whether to leave the epoch: decided by all ranks together, between segments."""
        return self._epoch.stage is Stage.AGREED and bool(super().done)

    @property
    def batches_of_all_ranks(self) -> int:
        """Batches of this epoch that all ranks have finished, per rank, as DDP would count them; known on rank 0."""
        plan = self._epoch.plan
        return 0 if plan is None else plan.batches_done(plan.tickets - self._coordinator.unfinished_tickets)

    @override
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        before = self.batch_progress.total.ready - self.batch_progress.current.ready
        step = self.global_step
        self._epoch = EpochState(
            batches_before=before,
            clock=step,
            log_clock=self._coordinator.clock.log_step,
            first_step=step,
            first_batch=self.batch_progress.current.ready,
            scheduled=step,
        )
        super().on_run_start(data_fetcher)

    @override
    def state_dict(self, destination: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict(destination, prefix)
        plan, coordinator = self._epoch.plan, self._fit_coordinator
        taken = None if coordinator is None else coordinator.snapshot_between_batches
        if plan is not None and taken is not None:
            snapshot, step = taken
            # The epoch is not over before all ranks have met, so at least one batch is to come.
            done = sum(stop - start for start, stop in snapshot.applied)
            batches = min(plan.batches_done(done), plan.batches - 1)
            rewrite_as_ddp(state, prefix, batches, self._epoch.batches_before, step)
        return state

    @override
    def reset(self) -> None:
        with warnings.catch_warnings():
            fetcher = self.trainer.fit_loop._data_fetcher
            if isinstance(fetcher, TicketFetcher) and fetcher.is_shared:
                # The ledger resumes it, whatever the loader can do.
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            super().reset()

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        assert isinstance(data_fetcher, TicketFetcher)
        if self._epoch.stage is not Stage.APART:
            self._start_segment(data_fetcher)
            if self._epoch.stage is Stage.AGREED:
                return
        learned = self._epoch.learning and self._coordinator.clock.has_learned
        if learned or not data_fetcher.has_next():
            self._finish_segment(data_fetcher)
            return
        try:
            super().advance(data_fetcher)
        except StopIteration as error:
            if not self.batch_progress.is_last_batch:
                raise RuntimeError(
                    "StopIteration was raised while a train batch was computed, by training_step or a hook of a batch: "
                    "an iterator in it has ended, and ranks take unlike numbers of batches. Begin it anew there, or "
                    "return -1 from on_train_batch_start to skip the rest of the epoch."
                ) from error
            # `on_train_batch_start` returned -1: the rest of the epoch is skipped, here as everywhere.
            self._coordinator.batches.stop_dispatch()
            self._finish_segment(data_fetcher, skip_rest=True)

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        if self._epoch.stage is not Stage.APART:
            return
        super().on_advance_end(data_fetcher)
        if self._signals.sigterm_received and self._coordinator.may_leave:
            self._coordinator.leave_run()
        self._signals.save()
        self._coordinator.take_snapshot()
        self._requeue_if_asked()
        if self._wants_to_stop():
            self._coordinator.batches.stop_dispatch()

    def _requeue_if_asked(self) -> None:
        # In the signal's handler it would save in the middle of an update, whose lock this very thread may hold.
        requeue, self._signals.requeue = self._signals.requeue, None
        if requeue is not None:
            requeue()

    @override
    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        if interval != "step":
            super().update_lr_schedulers(interval, update_plateau_schedulers)
            return
        if update_plateau_schedulers:
            self._step_schedulers(self._epoch.ticks, plateau=True)
        else:
            self._tick()
            self._follow_clock()

    def begin_batch(self, samples: int) -> None:
        """Notes that a batch is computed; the parameters that it waited for may be many steps on."""
        self._coordinator.begin_batch(samples)
        self._follow_clock()

    def _follow_clock(self) -> None:
        previous, self._epoch.scheduled = self._epoch.scheduled, self.global_step
        self._step_schedulers(range(previous + 1, self._epoch.scheduled + 1), plateau=False)

    def _step_schedulers(self, steps: range, plateau: bool) -> None:
        # Once for each step of the shared clock, however many of them this rank computed.
        for step in steps:
            batches = (step - self._epoch.first_step) * int(self.trainer.accumulate_grad_batches)
            self._epoch.scheduled_batch = self._epoch.first_batch + batches - 1
            try:
                self._update_learning_rates("step", update_plateau_schedulers=plateau)
            finally:
                self._epoch.scheduled_batch = None

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Runs no collective; a SIGTERM stops the dispatch and is agreed on at the next stop."""

    @override
    def _num_ready_batches_reached(self) -> bool:
        return self._epoch.stage is not Stage.APART and bool(self.batch_progress.is_last_batch)

    @override
    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        """Never after a batch; `_finish_segment` decides."""
        return False

    def _tick(self) -> None:
        epoch, clock = self._epoch, self.global_step
        previous, epoch.clock = epoch.clock, clock
        epoch.ticks = range(previous + 1, clock + 1)
        previous, epoch.log_clock = epoch.log_clock, self._coordinator.clock.log_step
        clock = epoch.log_clock
        trainer: Any = self.trainer  # attributes that connectors set are unknown to type checkers
        every = trainer.log_every_n_steps
        self._batches_that_stepped = log_position(previous, clock, every)
        if every and clock // every > previous // every:
            self._coordinator.log_metrics(self._batches_that_stepped)

    def _wants_to_stop(self) -> bool:
        trainer: Any = self.trainer
        if self._signals.sigterm_received:
            return True
        if trainer.should_stop and trainer.fit_loop._can_stop_early:
            return True
        if self.max_steps != -1 and not self._epoch.learning:
            counted, steps = self._coordinator.clock.steps_of_all_ranks
            # As under DDP, every rank makes the batch in which it reaches them.
            if counted >= self._ranks * -(-self.max_steps // steps) * steps:
                return True
        interval = trainer._val_check_time_interval
        if interval is not None and trainer.is_global_zero and time.monotonic() - trainer._last_val_time >= interval:
            self._epoch.validation_requested = True
            return True
        return False

    def _start_segment(self, fetcher: TicketFetcher) -> None:
        epoch, coordinator, clock = self._epoch, self._coordinator, self._coordinator.clock
        if coordinator.joins:
            self._join_segment(fetcher)
            return
        self._agree_on_stopping()
        if super().done:
            return
        # The epoch's order and plan, once.
        if epoch.plan is None:
            limit = self.trainer.num_training_batches
            tickets = None if limit == float("inf") else int(limit) * self._ranks
            order = fetcher.begin_epoch(self.trainer.current_epoch, tickets)
            epoch.plan = self._plan_epoch(fetcher)
            self._begin_epoch(fetcher, epoch.plan, order)
        # Where this segment ends. User code may have shown only now how many batches it takes for a step.
        epoch.plan = replace(epoch.plan, block=clock.block)
        tickets = epoch.plan.until_stop(epoch.tickets_done)
        epoch.learning = clock.must_learn
        if self.max_steps != -1 and not epoch.learning:
            counted, steps = clock.steps_of_all_ranks
            tickets = min(tickets, tickets_until(self.max_steps, counted, self._ranks, steps, clock.block))
        if (measured := coordinator.steps_to_measure) is not None:
            tickets = min(tickets, measured * self._ranks * clock.block)
        # Lightning, or user code, zeroes and steps where this rank's count of batches is a multiple of the block.
        ready = self.batch_progress.current.ready
        self.batch_progress.current.ready = ready + -ready % clock.block
        epoch.batches_started = self._batches_started
        # The ranks part.
        coordinator.enter_segment(tickets, equal_shares=epoch.learning)
        source = coordinator.batches
        fetcher.open(source.draw, source.release, source.leave_out, ahead=not epoch.learning)
        epoch.stage = Stage.APART
        coordinator.open_admission()

    def _join_segment(self, fetcher: TicketFetcher) -> None:
        """Begins where the others are, in the middle of an epoch."""
        coordinator, limit = self._coordinator, self.trainer.num_training_batches
        tickets = None if limit == float("inf") else int(limit) * self._ranks
        order = fetcher.begin_epoch(self.trainer.current_epoch, tickets)
        epoch = self._epoch = restore_epoch(self.trainer, coordinator.join_segment(order))
        epoch.batches_started = self._batches_started
        fetcher.fetched = self.batch_progress.current.ready
        source = coordinator.batches
        fetcher.open(source.draw, source.release, source.leave_out, ahead=not epoch.learning)
        epoch.stage = Stage.APART

    def _begin_epoch(self, fetcher: TicketFetcher, plan: EpochPlan, order: str) -> None:
        epoch = self._epoch
        done = self.batch_progress.current.ready
        epoch.tickets_done = plan.tickets if done >= plan.batches else done * self._ranks
        place = self._coordinator.begin_epoch(plan.tickets, order, epoch.tickets_done, fetcher.matches)
        epoch.draws_further = fetcher.draws_further
        if place is not None:
            epoch.tickets_done = sum(stop - start for start, stop in place.applied)
            # The number of ranks may be another one now.
            self._count_as_ddp(plan.batches_done(epoch.tickets_done), is_last=False)
            # What the schedulers had yet to catch up with when the checkpoint was saved between two batches.
            epoch.first_batch = self.batch_progress.current.ready
            epoch.clock = epoch.scheduled = place.clock
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
        # A stream, as under DDP, begins anew and is as much shorter.
        fetcher.fetched = self.batch_progress.current.ready

    def _plan_epoch(self, fetcher: TicketFetcher) -> EpochPlan:
        trainer = self.trainer
        batches, tickets = epoch_size(trainer, fetcher, self._ranks)
        every: int | None = None
        if self._should_check_val_epoch() and trainer.val_check_batch not in (None, float("inf")):
            every = int(trainer.val_check_batch)
        across_epochs = trainer.check_val_every_n_epoch is None
        return EpochPlan(
            tickets=tickets,
            batches=batches,
            world_size=self._ranks,
            validate_every=every,
            batches_before=self._epoch.batches_before if across_epochs else 0,
            block=self._coordinator.clock.block,
        )

    def _finish_segment(self, fetcher: TicketFetcher, skip_rest: bool = False) -> None:
        stop = self._meet(fetcher, skip_rest)
        self._share_state(stop)
        self._catch_up(stop)
        self._validate_if_due(stop)
        self._step_and_log()
        # Whether to go on.
        self._epoch.validation_requested = False
        self._agree_on_stopping()
        if not self._is_training_done and self.trainer.received_sigterm:
            raise SIGTERMException

    def _meet(self, fetcher: TicketFetcher, skip_rest: bool) -> EpochStop:
        """Ends the segment; returns where in the epoch the ranks have met."""
        epoch, plan = self._epoch, self._epoch.plan
        assert plan is not None
        if self._coordinator.batches.has_unreported_batches:
            flush_accumulated_gradients(self)
        end = self._coordinator.leave_segment(epoch.validation_requested, skip_rest)
        epoch.stage = Stage.MET
        if epoch.draws_further:
            self._coordinator.compare_orders(fetcher.digests)
        before, epoch.tickets_done = epoch.tickets_done, end.tickets_done
        exhausted = end.tickets_left == 0
        # Streams may end before, or at an end that nobody knew of.
        position = plan.end(epoch.tickets_done) if exhausted else epoch.tickets_done
        return EpochStop(
            position=position,
            batches=plan.batches_done(position),
            batches_since=plan.batches_computed(position) - plan.batches_computed(before),
            is_complete=exhausted or end.skip_rest,
            validation_requested=end.validation_requested,
        )

    def _share_state(self, stop: EpochStop) -> None:
        """Gives all ranks the same buffers, counters and logged entries."""
        self._coordinator.share_buffers(self._batches_started - self._epoch.batches_started, stop.batches_since)
        self._count_as_ddp(stop.batches, stop.is_complete)
        gather, reduce = self._collectives.gather_objects, self._collectives.reduce
        align_results(self._results, self.trainer.lightning_module, gather, reduce)

    def _catch_up(self, stop: EpochStop) -> None:
        """Does what has come due since this rank's last batch: bars, schedulers, averages, checkpoints, metrics."""
        trainer = self.trainer
        show_progress(trainer)
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        share_averages(trainer)
        self._coordinator.save_on_rank_zero(self._save_due)
        if stop.is_complete:
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._batches_that_stepped = max(0, self._coordinator.clock.log_step - 1)
        if not self._epoch.learning:
            self._coordinator.log_metrics(self._batches_that_stepped)

    def _save_due(self) -> None:
        save_passed(self.trainer)
        self._coordinator.take_snapshot()

    def _validate_if_due(self, stop: EpochStop) -> None:
        epoch, trainer = self._epoch, self.trainer
        assert epoch.plan is not None
        stopping = trainer.should_stop and trainer.fit_loop._can_stop_early
        due = epoch.plan.validation_due(stop.position) or stopping or stop.validation_requested
        due = due or (stop.is_complete and trainer.val_check_batch == float("inf"))
        # Where the streams turn out to have ended at the last stop already, there is nothing new to validate.
        if due and stop.position != epoch.validated_at and self._should_check_val_epoch():
            epoch.validated_at = stop.position
            self._validate()

    def _step_and_log(self) -> None:
        """Steps the plateau schedulers, which may watch what was just validated, and writes the loggers' rows."""
        self.update_lr_schedulers("step", update_plateau_schedulers=True)
        share_plateaus(self.trainer, self._collectives.broadcast, self._coordinator.stepped_plateaus)
        self._batches_that_stepped = self._coordinator.clock.log_step
        self._save_loggers_on_train_batch_end()

    def _validate(self) -> None:
        trainer = self.trainer
        trainer.validating = True
        first_loop_iter = trainer._logger_connector._first_loop_iter
        call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
        validate_whole(trainer, self.val_loop, self._collectives)
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_loop_iter

    def _count_as_ddp(self, batches: int, is_last: bool) -> None:
        count_as_ddp(self, batches, self._epoch.batches_before, self.global_step, is_last)
        self._coordinator.clock.restart()

    def _agree_on_stopping(self) -> None:
        trainer = self.trainer
        trainer.should_stop = self._collectives.reduce_boolean_decision(trainer.should_stop, all=False)
        self._epoch.stage = Stage.AGREED
