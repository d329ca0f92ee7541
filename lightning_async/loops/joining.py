"""What a rank that joins takes over from rank 0's trainer, as it stood when the segment under way began.

Private API: see the canary tests.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer import call

from lightning_async.loops.epoch_state import EpochState

__all__ = ["SegmentOverError", "TrainerState", "capture_trainer", "restore_epoch", "restore_trainer"]


class SegmentOverError(Exception):
    """The segment that a rank was about to join has ended; it takes over the state of the next one."""


@dataclass(frozen=True)
class TrainerState:
    """Where the ranks stand in a fit when a segment begins.

    Args:
        epochs: epochs that are done.
        epoch: where they stand in the present one.
        progress: of the fit loop and those in it.
        callbacks: of each callback.
        folders: of each checkpoint callback, where it saves.
        schedulers: of each learning-rate scheduler.
        should_stop: whether the fit is to end.
    """

    epochs: int
    epoch: EpochState
    progress: dict[str, Any]
    callbacks: dict[str, Any]
    folders: list[Any]
    schedulers: list[dict[str, Any]]
    should_stop: bool


def capture_trainer(trainer: Trainer) -> TrainerState:
    """Rank 0's, now."""
    fit_loop: Any = trainer.fit_loop
    progress = fit_loop.state_dict()
    # What loaders keep of their own is each rank's.
    progress.pop("state_dict", None)
    return TrainerState(
        epochs=int(fit_loop.epoch_progress.current.processed),
        epoch=copy.copy(fit_loop.epoch_loop._epoch),
        progress=progress,
        callbacks=call._call_callbacks_state_dict(trainer),
        folders=[getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks],
        schedulers=[config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        should_stop=bool(trainer.should_stop),
    )


def restore_trainer(trainer: Trainer, state: TrainerState) -> None:
    """Has this rank's trainer stand before the epoch that the others are in."""
    fit_loop: Any = trainer.fit_loop
    # Its own hooks and counts of the epoch come when it begins it.
    counts = fit_loop.epoch_progress.current
    fit_loop.load_state_dict(state.progress)
    fit_loop.restarting = False
    counts.ready = counts.started = counts.processed = counts.completed = state.epochs
    for callback, folder in zip(trainer.checkpoint_callbacks, state.folders, strict=True):
        if isinstance(callback, ModelCheckpoint):
            # Asked for rank 0's, it has been told its own.
            callback.dirpath = folder
    call._call_callbacks_load_state_dict(trainer, {"callbacks": state.callbacks})
    for config, scheduler in zip(trainer.lr_scheduler_configs, state.schedulers, strict=True):
        config.scheduler.load_state_dict(scheduler)
    trainer.should_stop = state.should_stop


def restore_epoch(trainer: Trainer, state: TrainerState) -> EpochState:
    """Has this rank's counts be those that the others began the segment with; returns where they stand in the epoch."""
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop.load_state_dict(state.progress, "epoch_loop.")
    epoch_loop.restarting = False
    return copy.copy(state.epoch)
