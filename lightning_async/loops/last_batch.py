"""The last batch of a callback that is called once more where the ranks meet.

Progress bars and ModelCheckpoints are told then what others have done since this rank's last batch. A subclass may look
at the outputs and the batch, which Lightning never leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["LastBatch"]

_HOOK = "on_train_batch_end"


class LastBatch:
    """Keeps what ``on_train_batch_end`` was last given, for callbacks whose hook user code has overridden.

    Lightning's own bars and checkpoints look at neither outputs nor batch, and get none, so that no batch stays in
    memory for them.

    Args:
        callback: whose hook it is; the caller passes what it is given to `keep`.
    """

    def __init__(self, callback: Callback) -> None:
        hook: Any = getattr(type(callback), _HOOK)
        self._is_wanted = not hook.__module__.startswith("lightning.")
        self._kept: tuple[Any, Any, int] | None = None

    def keep(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps a batch in the place of the one before."""
        if self._is_wanted:
            self._kept = (outputs, batch, batch_idx)

    def show(self, hook: Callable[..., None], trainer: Trainer, module: LightningModule) -> bool:
        """Calls ``hook`` with the last batch, and lets go of it.

        Returns:
            False if it was not called: user code wants a batch, and this rank has had none since it met others.
        """
        if self._kept is not None:
            hook(trainer, module, *self._kept)
            self._kept = None
            return True
        if not self._is_wanted:
            hook(trainer, module, None, None, 0)
        return not self._is_wanted
