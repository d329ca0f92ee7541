"""``trainer.save_checkpoint`` in a signal's handler: it is put off until the batch is done.

The handler runs in the main thread wherever that is: in the middle of an update whose lock it holds, of a request to
the holder, of a collective, or of another checkpoint.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_async.loops.patching import set_until_closed
from lightning_async.loops.protocols import RunSignals
from lightning_async.runtime.handlers import comes_between

__all__ = ["put_off_interrupting_saves"]


def put_off_interrupting_saves(trainer: Trainer, signals: RunSignals, undo: ExitStack) -> None:
    """Has ``trainer.save_checkpoint`` leave to `RunSignals.saves` what cannot be saved where it is called.

    Args:
        trainer: the trainer.
        signals: keeps what is to be saved until a batch is done.
        undo: gives the trainer its own method again.
    """
    save: Callable[..., None] = trainer.save_checkpoint
    is_saving = False

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        nonlocal is_saving
        if is_saving or comes_between(sys._getframe(1)):
            signals.saves.append(functools.partial(save_late, *args, **kwargs))
            return
        is_saving = True
        try:
            save(*args, **kwargs)
        finally:
            is_saving = False

    def save_late(*args: Any, **kwargs: Any) -> None:
        save_checkpoint(*args, **kwargs)
        path = args[0] if args else kwargs.get("filepath")
        rank_zero_info(f"{path} was asked for while a batch was under way, by a signal's handler, and is saved now.")

    set_until_closed(undo, trainer, "save_checkpoint", save_checkpoint)
