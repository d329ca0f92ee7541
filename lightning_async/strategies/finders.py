"""Callbacks that search for a batch size or a learning rate: refused, with the way to run them first."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["refuse_finders"]


def refuse_finders(trainer: Trainer) -> None:
    """Refuses the callbacks that ``Tuner.lr_find`` and ``Tuner.scale_batch_size`` add, or that the user has added.

    Args:
        trainer: the trainer, with all of its callbacks.

    Raises:
        MisconfigurationException: if there is one; the message says how to search on one device.
    """
    connected: Any = trainer  # attributes that connectors set are unknown to type checkers
    for callback in connected.callbacks:
        if isinstance(callback, LearningRateFinder):
            what, method, reason = (
                "learning-rate",
                "lr_find",
                "it raises the learning rate from batch to batch, and here a batch's loss is not that of the last rate",
            )
        elif isinstance(callback, BatchSizeFinder):
            what, method, reason = (
                "batch-size",
                "scale_batch_size",
                "it restarts when memory runs out, which is not at the same batch on all ranks",
            )
        else:
            continue
        raise MisconfigurationException(
            f"async_amsgrad cannot run the {what} finder: {reason}. Run it first on one device, "
            f'`Tuner(Trainer(devices=1, strategy="auto")).{method}(model)`, then train with what it has found.'
        )
