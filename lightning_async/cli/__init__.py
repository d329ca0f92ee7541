"""The command line `lightning-async`: LightningCLI with the asynchronous strategies, `compare` and `report`.

The outermost room: it imports the package, and nothing imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_async.runtime.interrupts import ending_at_once, leave_interrupted, let_through

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Runs `lightning-async`; see `lightning_async.cli.app.main`, which takes seconds to import.

    Args:
        args: arguments without the program's name; `None` takes those of the process.

    Raises:
        SystemExit: with the command's status; with 130 after Ctrl+C.
    """
    try:
        # A rank's process was started with Ctrl+C held back, and here it can be answered well.
        let_through()
    except KeyboardInterrupt:
        leave_interrupted()
    with ending_at_once():
        from lightning_async.cli.app import main as run
    run(args)
