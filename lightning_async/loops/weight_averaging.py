"""Lightning's ``WeightAveraging`` callbacks on a clock that all ranks share.

Under DDP every rank averages the same parameters. Here each rank sees other ones, at other steps: rank 0's average is
everyone's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from lightning_async.loops.patching import set_until_closed
from lightning_async.loops.tensor_sync import broadcast_tensors

__all__ = ["average_by_clock", "share_averages"]

_HOOK = "on_train_batch_end"


def average_by_clock(trainer: Trainer, ticks: Callable[[], range], undo: ExitStack) -> None:
    """Makes the callbacks average once for each step of the clock, on rank 0.

    Args:
        trainer: the trainer.
        ticks: tells the steps that the clock has just taken.
        undo: gives the callbacks their own hook again.
    """
    for callback in _averaging(trainer):
        # One with a hook of its own knows what it does.
        if getattr(type(callback), _HOOK) is getattr(WeightAveraging, _HOOK):
            set_until_closed(undo, callback, _HOOK, functools.partial(_average, callback, ticks))


def share_averages(trainer: Trainer) -> None:
    """Averages for the steps since rank 0's last batch, and gives all ranks rank 0's average; a collective call."""
    for callback in _averaging(trainer):
        if _HOOK in vars(callback):
            vars(callback)[_HOOK](trainer, trainer.lightning_module)
        model: Any = callback._average_model
        if trainer.world_size > 1 and model is not None:
            callback._latest_update_step = trainer.strategy.broadcast(callback._latest_update_step)
            broadcast_tensors(itertools.chain(model.parameters(), model.buffers()), trainer.strategy.root_device)


def _averaging(trainer: Trainer) -> Iterator[WeightAveraging]:
    callbacks: Any = trainer  # attributes that connectors set are unknown to type checkers
    return (callback for callback in callbacks.callbacks if isinstance(callback, WeightAveraging))


def _average(
    callback: WeightAveraging, ticks: Callable[[], range], trainer: Trainer, module: LightningModule, *_: Any
) -> None:
    if not trainer.is_global_zero:
        return
    assert callback._average_model is not None
    for step in ticks():
        if step > callback._latest_update_step and callback.should_update(step_idx=step - 1):
            callback._average_model.update_parameters(module)
            callback._latest_update_step = step
