"""How many optimizer steps Lightning counts under manual optimization."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["StepCounter", "batches_that_stepped"]


class StepCounter:
    """Tells what Lightning's own count of steps on this rank has grown by; user code may have a hand in it.

    Lightning counts the steps of all optimizers. A common way to count one of them only is to replace the hooks that
    its `LightningOptimizer` calls before and after a step; others raise the count themselves, or step a raw optimizer,
    which is not counted. So the count itself is what is reported.

    Args:
        trainer: the trainer.

    Attributes:
        is_stepping: whether a step of a `LightningOptimizer` is under way, which has not been counted yet.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loop: Any = trainer.fit_loop.epoch_loop.manual_optimization
        self._strategy = trainer.strategy
        self.is_stepping = False
        self._reported = self._count

    @property
    def _count(self) -> int:
        return int(self._loop.optim_step_progress.total.completed)

    def take(self, index: int | None = None) -> int:
        """Steps that were counted since the last call.

        Args:
            index: the optimizer whose step is under way; its own step is among those that are told.
        """
        # A bound method is equal to another one of the same object and function.
        coming = False
        if index is not None and self.is_stepping:
            coming = self._strategy._lightning_optimizers[index]._on_after_step == self._loop._on_after_step
        new = max(0, self._count + coming - self._reported)
        self._reported += new
        return new

    def restart(self) -> None:
        """Begins anew: Lightning's count was set to that of all ranks."""
        self._reported = self._count


def batches_that_stepped(trainer: Trainer) -> int:
    """What Lightning's loggers take as their x-axis, of an earlier fit or a checkpoint that was loaded."""
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    return int(epoch_loop._batches_that_stepped)
