"""``ModelCheckpoint(every_n_train_steps=n)`` on a clock that can pass several steps between two batches of a rank.

Lightning saves where ``trainer.global_step % n == 0``. The clock is shared by all ranks, so the rank that saves may see
step ``n - 1`` and then ``n + 1``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.loops.last_batch import LastBatch
from lightning_async.loops.patching import set_until_closed
from lightning_async.loops.trainer_state import within_epoch

__all__ = ["StepInterval", "save_by_clock", "save_passed"]


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


def save_by_clock(trainer: Trainer, ticks: Callable[[], range], undo: ExitStack) -> None:
    """Makes the callbacks that save every n steps save when the clock has passed a multiple of n.

    One checkpoint is saved for all multiples that the clock has passed since this rank's last batch.

    Args:
        trainer: the trainer.
        ticks: tells the steps that the clock has just taken.
        undo: gives the callbacks their own interval again.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps > 0:
            interval = StepInterval.of(callback._every_n_train_steps, ticks)
            set_until_closed(undo, callback, "_every_n_train_steps", interval)
            set_until_closed(undo, callback, _HOOK, _keeping(callback))


def save_passed(trainer: Trainer) -> None:
    """Lets the callbacks save whose interval the clock has passed since this rank's last batch."""
    with within_epoch(trainer):
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                interval: Any = callback._every_n_train_steps
                if isinstance(interval, StepInterval) and interval.passed:
                    hook: Any = vars(callback)[_HOOK]
                    if not hook.last.show(hook, trainer, trainer.lightning_module):
                        # A checkpoint is due all the same; Lightning's own hook looks at no batch.
                        ModelCheckpoint.on_train_batch_end(callback, trainer, trainer.lightning_module, None, None, 0)


def _keeping(callback: ModelCheckpoint) -> Callable[..., None]:
    save, last = callback.on_train_batch_end, LastBatch(callback)

    def on_train_batch_end(trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last.keep(outputs, batch, batch_idx)
        save(trainer, module, outputs, batch, batch_idx)

    on_train_batch_end.last = last  # type: ignore[attr-defined]  # for `save_passed`
    return on_train_batch_end
