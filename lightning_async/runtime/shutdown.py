"""The end of a process whose run has failed: it comes, whatever the interpreter's own way out is stuck in."""

from __future__ import annotations

import sys
import threading

from lightning_async.runtime.alarms import Alarm
from lightning_async.runtime.failure import end_process

__all__ = ["guard_shutdown", "note_failed_run"]

# What the interpreter and Gloo may take to shut down after a failure.
_SHUTDOWN_S = 5.0

_a_run_has_failed = threading.Event()


def note_failed_run() -> None:
    """A run of this process has failed."""
    _a_run_has_failed.set()


def guard_shutdown() -> None:
    """Ends this process if it does not come to its end after a failed run; for ``atexit``."""
    if _a_run_has_failed.is_set():
        Alarm(_end_now).set(_SHUTDOWN_S)


def _end_now() -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        end_process()
