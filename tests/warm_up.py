"""What every rank would do for itself, done once in the process that the ranks of all tests are forked from.

It changes nothing but time: modules that are imported late, and what Python and torch look up once in a process.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from pathlib import Path

from lightning_async.loops.collective_guard import collective_operators
from tests.models import TinyClassifier, fork_trainer, loader

__all__ = ["warm_up"]

# DDP's set-up imports the first one, a look-up of a host's name the second.
_LATE = ("torch.distributed.algorithms.ddp_comm_hooks", "encodings.idna")


def warm_up() -> None:
    """Trains for two batches, on the CPU and without a strategy of this package: its process group has threads."""
    for name in _LATE:
        importlib.import_module(name)
    collective_operators()
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = fork_trainer(Path(folder), 1, "auto", limit_train_batches=2, limit_val_batches=1)
            trainer.fit(TinyClassifier(), loader(16), loader(16))
    finally:
        logging.disable(logging.NOTSET)
