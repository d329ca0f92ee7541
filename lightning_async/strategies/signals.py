"""What the operating system's signals ask of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from typing_extensions import override

from lightning_async.loops.protocols import RunSignals

__all__ = ["Signals"]


class _Kills(Protocol):
    def kill(self, signum: int) -> None:
        """Sends a signal to the ranks that were started from here."""


class Signals(RunSignals):
    """Notes what signals ask for, until the loops answer between two batches.

    Attributes:
        sigterm_received: whether this rank was told to end gracefully.
        requeue: saves and requeues the job, once SLURM has asked for it.
        saves: the checkpoints that user code has asked for where none could be saved, in a signal's handler.
        launcher: what has started the other ranks; None before.
    """

    def __init__(self) -> None:
        self.sigterm_received = False
        self.requeue: Callable[[], None] | None = None
        self.saves: list[Callable[[], None]] = []
        self.launcher: _Kills | None = None

    def forget(self) -> None:
        """Forgets what an earlier fit was asked for."""
        self.sigterm_received, self.requeue = False, None
        self.saves.clear()

    @override
    def save(self) -> None:
        while self.saves:
            self.saves.pop(0)()

    @override
    def pass_on(self, signum: int) -> None:
        if self.launcher is not None:
            self.launcher.kill(signum)
