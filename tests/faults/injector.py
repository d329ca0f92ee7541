"""The package's faults, and the process ids of the ranks that they strike."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_async.chaos import Fault, InjectedError, Kind
from lightning_async.chaos import FaultInjector as PackagesFaultInjector

__all__ = ["Fault", "FaultInjector", "InjectedError", "Kind", "pid_of"]


class FaultInjector(PackagesFaultInjector):
    """Leaves each rank's process id in a file, too."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        note = Path(f"pid-{trainer.global_rank}")
        if not note.exists():
            note.write_text(str(os.getpid()))


def pid_of(folder: Path, rank: int, timeout_s: float = 40.0) -> int:
    """The process id of a rank that has computed its first batch; waits for it."""
    deadline = time.monotonic() + timeout_s
    note = folder / f"pid-{rank}"
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline, f"rank {rank} has computed nothing in {timeout_s} s"
        time.sleep(0.02)
    return int(note.read_text())
