"""What stands in a launcher's place where an engine such as Ray Train has started the rank's process, and owns it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_async.runtime.failure import WorkerFailedError
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.launchers import Launchers
from lightning_async.strategies.protocols import LaunchedStrategy, ProcessOwner, RunGuard

__all__ = ["OwnedLauncher"]


class OwnedLauncher:
    """Runs the trainer's function where it is: the owner has started the ranks, and it alone ends them.

    Args:
        strategy: whose rank this is.
        guard: what the function runs in.
        owner: the engine that has started the process.
    """

    is_interactive_compatible = True

    def __init__(self, strategy: LaunchedStrategy, guard: RunGuard, owner: ProcessOwner) -> None:
        self._strategy = strategy
        self._guard = guard
        self._owner = owner

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Runs the function as this rank.

        Args:
            function: the trainer's.
            *args: for it.
            trainer: the trainer; None where Lightning does not tell.
            **kwargs: for the function.
        """
        if trainer is not None:
            self._strategy.refuse_before_launch(trainer)
        with self._guard.guard_run():
            return function(*args, **kwargs)

    def describe_start(self, num_nodes: int) -> str:
        """What starts the ranks, for a rank that waits for the others."""
        return f"{self._owner.name} starts them; see in what they print whether all of them have come so far"

    def describe_end(self, local_rank: int) -> str | None:
        """How another rank's process has ended: only the owner knows."""
        return None

    def serve(self, address: Address, launchers: Launchers | None) -> None:
        """Starts no lost rank again: the owner decides."""

    def exit_process(self, code: int) -> None:
        """Tells the owner, which ends the process, of the failure that this rank's thread does not come back to."""
        if self._guard.failure is not None:
            self._owner.report(WorkerFailedError(self._guard.failure))

    def kill(self, signum: int) -> None:
        """Sends a signal to the ranks that were started from here: there are none."""

    def interrupt(self) -> None:
        """Leaves Ctrl+C to the owner."""
