"""Where a fit begins that was given no checkpoint: where the job stood that was started again.

Private API: see the canary tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Trainer

from lightning_async.loops.patching import set_until_closed

__all__ = ["Snapshots", "begin_from_snapshot"]


class Snapshots(Protocol):
    """Knows the snapshot that a run has left."""

    def choose(self, path: Path | None, is_requeued: bool) -> Path | None:
        """What a fit begins from; every rank is asked, before it is set up.

        Args:
            path: what it was given; None if nothing.
            is_requeued: whether that is what Lightning itself has found, which it saved when SLURM ended the job.
        """


def begin_from_snapshot(trainer: Trainer, snapshots: Snapshots, undo: ExitStack) -> None:
    """Has a fit ask for the checkpoint that it begins from.

    Args:
        trainer: the trainer.
        snapshots: are asked.
        undo: gives the trainer its own way again.
    """
    connector: Any = trainer._checkpoint_connector
    resume_start: Callable[..., None] = connector.resume_start

    def resume(checkpoint_path: str | Path | None = None, weights_only: bool | None = None) -> None:
        given = Path(checkpoint_path) if checkpoint_path else None
        requeued = connector._hpc_resume_path if given is not None else None
        chosen = snapshots.choose(given, requeued is not None and str(given) == str(requeued))
        if chosen == given:
            resume_start(checkpoint_path, weights_only=weights_only)
        else:
            # It is the run's own, with whatever its callbacks keep.
            resume_start(chosen, weights_only=False if weights_only is None else weights_only)

    set_until_closed(undo, connector, "resume_start", resume)
