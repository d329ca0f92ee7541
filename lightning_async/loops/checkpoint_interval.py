"""``ModelCheckpoint(every_n_train_steps=n)`` on a clock that can pass several steps between two batches of a rank.

Lightning saves where ``trainer.global_step % n == 0``. The clock is shared by all ranks, so the rank that saves may see
step ``n - 1`` and then ``n + 1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.loops.last_batch import LastBatch

__all__ = ["StepInterval", "follow_clock", "save_passed", "unfollow_clock"]


_HOOK = "on_train_batch_end"


class StepInterval(int):
    """A number of steps that also divides the present step if the clock has just passed one that it divides.

    Examples:
        >>> interval = StepInterval.of(5, lambda: range(4, 8))
        >>> 7 % interval, 7 // interval, interval
        (0, 1, 5)
        >>> 7 % StepInterval.of(5, lambda: range(6, 8))
        2
    """

    _ticks: Callable[[], range]

    @classmethod
    def of(cls, steps: int, ticks: Callable[[], range]) -> StepInterval:
        """An interval of ``steps``, where ``ticks`` tells the steps that the clock has just taken."""
        interval = cls(steps)
        interval._ticks = ticks
        return interval

    @property
    def passed(self) -> bool:
        """Whether the clock has just passed a multiple."""
        return any(step % int(self) == 0 for step in self._ticks())

    def __rmod__(self, step: int) -> int:
        return 0 if self.passed else step % int(self)


def follow_clock(trainer: Trainer, ticks: Callable[[], range]) -> None:
    """Makes the callbacks that save every n steps save when the clock has passed a multiple of n.

    One checkpoint is saved for all multiples that the clock has passed since this rank's last batch.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps > 0:
            callback._every_n_train_steps = StepInterval.of(callback._every_n_train_steps, ticks)
            vars(callback)[_HOOK] = _keeping(callback)


def save_passed(trainer: Trainer) -> None:
    """Lets the callbacks save whose interval the clock has passed since this rank's last batch."""
    connector: Any = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    # As within an epoch; else the epoch's metrics would be computed, on this rank alone.
    connector._first_loop_iter = False
    try:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                interval: Any = callback._every_n_train_steps
                if isinstance(interval, StepInterval) and interval.passed:
                    hook: Any = vars(callback)[_HOOK]
                    if not hook.last.show(hook, trainer, trainer.lightning_module):
                        # A checkpoint is due all the same; Lightning's own hook looks at no batch.
                        ModelCheckpoint.on_train_batch_end(callback, trainer, trainer.lightning_module, None, None, 0)
    finally:
        connector._first_loop_iter = first_loop_iter


def unfollow_clock(trainer: Trainer) -> None:
    """Undoes `follow_clock`."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._every_n_train_steps = int(callback._every_n_train_steps)
            vars(callback).pop(_HOOK, None)


def _keeping(callback: ModelCheckpoint) -> Callable[..., None]:
    save, last = callback.on_train_batch_end, LastBatch(callback)

    def on_train_batch_end(trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last.keep(outputs, batch, batch_idx)
        save(trainer, module, outputs, batch, batch_idx)

    on_train_batch_end.last = last  # type: ignore[attr-defined]  # for `save_passed`
    return on_train_batch_end
