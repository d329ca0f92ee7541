"""Ranks of different speed on a machine whose cores are all alike."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

__all__ = ["EmulatedStepTime"]


class EmulatedStepTime(Callback):
    """Make ranks differ in speed by sleeping in each training batch, between forward and backward.

    A sleeping rank uses no processor, so a machine with few cores behaves like accelerators of different speed.

    Args:
        seconds_by_rank: how long each rank sleeps in each of its batches, in seconds, rank 0 first. Ranks
            beyond the list do not sleep.

    Raises:
        ValueError: if a duration is negative.
    """

    def __init__(self, seconds_by_rank: list[float]) -> None:
        if any(seconds < 0 for seconds in seconds_by_rank):
            raise ValueError(f"seconds_by_rank must not be negative, got {seconds_by_rank}")
        self.seconds_by_rank = seconds_by_rank

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sleep for this rank's duration."""
        if trainer.global_rank < len(self.seconds_by_rank):
            time.sleep(self.seconds_by_rank[trainer.global_rank])
