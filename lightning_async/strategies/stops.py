"""Where the training of a simulated cluster stops: told before any other callback or hook of the stop is called."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

__all__ = ["Stops"]


class Stops(Callback):
    """Tells of the stops of training; to be the first of the callbacks.

    Args:
        stop: called at a validation, and with True at the epoch's end.
    """

    def __init__(self, stop: Callable[[bool], None]) -> None:
        self._stop = stop

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of a validation."""
        self._stop(False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of the epoch's end."""
        self._stop(True)
