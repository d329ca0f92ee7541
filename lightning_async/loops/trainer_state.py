"""What the strategy reads from, and writes to, private fields of the trainer and its callbacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.optim import Optimizer

__all__ = [
    "checkpoint_fields",
    "is_optimizer",
    "logger_prefix",
    "optimizer_steps",
    "run_seed",
    "set_checkpoint_fields",
    "set_received_sigterm",
    "within_epoch",
]


def is_optimizer(optimizer: Optimizer) -> bool:
    """False for what Lightning puts in the place of an optimizer that ``configure_optimizers`` did not return."""
    return not isinstance(optimizer, _MockOptimizer)


def optimizer_steps(trainer: Trainer) -> int:
    """Steps that Lightning has counted so far: 0, or what an earlier fit of this trainer made."""
    return int(_TrainingEpochLoop.global_step.fget(trainer.fit_loop.epoch_loop))  # type: ignore[attr-defined]


def logger_prefix(logger: WandbLogger) -> str:
    """What ``logger`` puts in front of the names of metrics."""
    own: Any = logger
    return f"{own._prefix}{own.LOGGER_JOIN_CHAR}" if own._prefix else ""


@contextmanager
def within_epoch(trainer: Trainer) -> Iterator[None]:
    """While callbacks are called as after a batch, and the epoch's metrics are not computed: on this rank alone."""
    connector: Any = trainer._logger_connector
    before, connector._first_loop_iter = connector._first_loop_iter, False
    try:
        yield
    finally:
        connector._first_loop_iter = before


def run_seed() -> int:
    """The seed of the global order of batches: that of ``seed_everything``, as Lightning's own samplers take it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def set_received_sigterm(trainer: Trainer) -> None:
    """Makes ``trainer.received_sigterm`` true, once all ranks have agreed on it."""
    trainer._signal_connector.received_sigterm = True


# What ModelCheckpoint decides on, in collective calls, at the next stop: it must be the same on every rank.
_CHECKPOINT_FIELDS = (
    "_last_global_step_saved",
    "_last_time_checked",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
    "current_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "best_model_score",
    "best_model_path",
    "last_model_path",
)


def checkpoint_fields(trainer: Trainer) -> list[dict[str, Any]]:
    """What this rank's Checkpoint callbacks have noted."""
    return [
        {name: vars(callback)[name] for name in _CHECKPOINT_FIELDS if name in vars(callback)}
        for callback in trainer.checkpoint_callbacks
    ]


def set_checkpoint_fields(trainer: Trainer, fields: list[dict[str, Any]]) -> None:
    """Takes over what rank 0's Checkpoint callbacks have noted."""
    for callback, noted in zip(trainer.checkpoint_callbacks, fields, strict=True):
        vars(callback).update(noted)
