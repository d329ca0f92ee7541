"""What Linux is asked for on behalf of a process: a signal at its parent's end, its name, the orphans below it."""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress

__all__ = ["adopt_orphans", "name_process", "signal_at_parents_end"]

# Of linux/prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36


def signal_at_parents_end(signum: signal.Signals) -> None:
    """Has the system send a signal to this process when the one that has started it ends, in the place of another.

    SIGCONT kills nothing, and wakes a process that is stopped.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)


def name_process(name: str) -> None:
    """Has ``ps -o comm`` and ``top`` show this process by a name, of which they show 15 letters."""
    _prctl(_PR_SET_NAME, name.encode())


def adopt_orphans() -> None:
    """Makes what descendants of this process leave behind children of this process, so that it is found."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: int | bytes) -> None:
    # Elsewhere there is no such call.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)
