"""What is put in place in a trainer while a fit runs, and taken away after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer

from lightning_async.loops.checkpoint_interval import save_by_clock
from lightning_async.loops.epoch_loop import AsyncEpochLoop
from lightning_async.loops.epoch_state import EpochState
from lightning_async.loops.fit_loop import AsyncFitLoop
from lightning_async.loops.interrupted_saves import put_off_interrupting_saves
from lightning_async.loops.metric_sync import MetricSync
from lightning_async.loops.optimization import AsyncAutomaticOptimization
from lightning_async.loops.patching import become_until_closed, set_until_closed
from lightning_async.loops.phase import Phase
from lightning_async.loops.progress_bar import show_all_ranks
from lightning_async.loops.protocols import Collectives, Coordinator, RunSignals
from lightning_async.loops.restarts import Snapshots, begin_from_snapshot
from lightning_async.loops.weight_averaging import average_by_clock
from lightning_async.monitoring.stats import RunStats

__all__ = ["InstalledLoops", "install"]


class InstalledLoops:
    """This package's behaviour in one trainer's loops, made by `install`.

    Args:
        trainer: the trainer.
        metrics: torchmetrics in phases.

    Attributes:
        metrics: torchmetrics in phases.
        undo: everything that is to be undone.
    """

    def __init__(self, trainer: Trainer, metrics: MetricSync) -> None:
        self.metrics = metrics
        self.undo = ExitStack()
        self._epoch_loop: Any = trainer.fit_loop.epoch_loop

    def follow(self, coordinator: Coordinator) -> None:
        """Trains by what a coordinator says, from here on."""
        self._epoch_loop._fit_coordinator = coordinator

    @property
    def scheduled_steps(self) -> int:
        """Steps of the shared clock that this rank's learning-rate schedulers have made."""
        return int(self._epoch_loop._epoch.scheduled)

    def remove(self) -> None:
        """Leaves Lightning as it was; the loops keep their state. Idempotent."""
        self.undo.close()


def install(
    trainer: Trainer,
    name: str,
    collectives: Collectives,
    phase: Phase,
    signals: RunSignals,
    stats: Callable[[], RunStats],
    on_train_loaders: Callable[[int], None],
    snapshots: Snapshots | None = None,
) -> InstalledLoops:
    """Gives the trainer's loops, callbacks and signal handlers this package's behaviour.

    If a step of it fails, those before are undone.

    Args:
        trainer: the trainer.
        name: the strategy's name, for messages.
        collectives: the strategy's own.
        phase: the run's phase.
        signals: notes what signals ask for.
        stats: tells the run's statistics.
        on_train_loaders: told how many train loaders there are, before they are processed.
        snapshots: know what a job that was started again goes on from; None without.
    """
    with ExitStack() as undo:
        fit_loop: Any = trainer.fit_loop
        epoch_loop: Any = fit_loop.epoch_loop

        def ticks() -> range:
            recent: range = epoch_loop._epoch.ticks
            return recent

        # The loops: Lightning's own objects, whose state stays, with another behaviour.
        for loop, attributes in (
            (
                epoch_loop,
                {
                    "_epoch": EpochState(),
                    "_collectives": collectives,
                    "_signals": signals,
                    "_fit_coordinator": None,
                },
            ),
            (
                fit_loop,
                {"_collectives": collectives, "_strategy_name": name, "_on_train_loaders": on_train_loaders},
            ),
        ):
            for attribute, value in attributes.items():
                set_until_closed(undo, loop, attribute, value)
        become_until_closed(undo, fit_loop, AsyncFitLoop)
        become_until_closed(undo, epoch_loop, AsyncEpochLoop)
        become_until_closed(undo, epoch_loop.automatic_optimization, AsyncAutomaticOptimization)
        # The callbacks, which count this rank's batches by themselves.
        show_all_ranks(trainer, stats, undo)
        save_by_clock(trainer, ticks, undo)
        average_by_clock(trainer, ticks, undo)
        # The signal handlers, which run wherever the process happens to be.
        _note_signals(trainer, signals, collectives, undo)
        put_off_interrupting_saves(trainer, signals, undo)
        if snapshots is not None:
            begin_from_snapshot(trainer, snapshots, undo)
        # torchmetrics, in the whole process.
        metrics = MetricSync(phase, collectives)
        metrics.install(undo)
        installed = InstalledLoops(trainer, metrics)
        installed.undo = undo.pop_all()
        return installed


def _note_signals(trainer: Trainer, signals: RunSignals, collectives: Collectives, undo: ExitStack) -> None:
    connector: Any = trainer._signal_connector

    def on_sigterm(signum: int, frame: object) -> None:
        # Where ranks may leave alone, rank 0's end is agreed on with the others at the next stop.
        if not signals.sigterm_received and not (collectives.outlives_ranks and trainer.is_global_zero):
            signals.pass_on(signum)
        signals.sigterm_received = True

    requeue = connector._slurm_sigusr_handler_fn

    def on_requeue(signum: int, frame: object) -> None:
        signals.requeue = functools.partial(requeue, signum, frame)

    set_until_closed(undo, connector, "_sigterm_notifier_fn", on_sigterm)
    set_until_closed(undo, connector, "_slurm_sigusr_handler_fn", on_requeue)
