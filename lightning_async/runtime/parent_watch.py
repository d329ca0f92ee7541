"""How a child process ends with its parent; or outlives it for a moment, and is told of its end."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["ParentGoneError", "ParentWatch", "end_with_parent", "name_process"]

# Of linux/prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def end_with_parent(signum: signal.Signals) -> None:
    """Has the system send a signal to this process when the one that has started it ends; on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)


def name_process(name: str) -> None:
    """Has ``ps -o comm`` and ``top`` show this process by a name, of which they show 15 letters; on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


class ParentGoneError(RuntimeError):
    """The process that has started this one is gone."""


class ParentWatch:
    """Raises in the main thread, where that waits for its parent, once the parent is gone.

    The end of a connection to the parent would not do: what the parent has forked has its end of it, too. The system
    sends SIGCONT, which also wakes a process that is stopped.

    Examples:
        >>> watch = ParentWatch()
        >>> with watch.waiting():
        ...     pass
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._waits = False

    def start(self) -> None:
        """Begins to watch, in the main thread; from here on the parent's end does not end this process.

        Raises:
            OSError: if the system refuses.
        """
        signal.signal(signal.SIGCONT, self._look)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the main thread waits, and for no longer: nothing else is interrupted.

        Raises:
            ParentGoneError: if the parent is gone.
        """
        self._waits = True
        try:
            if os.getppid() != self._parent:
                raise ParentGoneError
            yield
        finally:
            self._waits = False

    def _look(self, signum: int, frame: FrameType | None) -> None:
        # It comes also where somebody lets a stopped process go on.
        if self._waits and os.getppid() != self._parent:
            raise ParentGoneError
