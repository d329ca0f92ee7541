"""The news that something at the holder has changed, for those whom the barrier holds back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from lightning_async.runtime.failure import FailureLatch

__all__ = ["Changes"]


class Changes:
    """Counts changes, and wakes who waits for the next one; it ends with the run's failure at the latest.

    Args:
        lock: a re-entrant one, under which the changes are made.
        latch: the run's failure latch.
    """

    def __init__(self, lock: Any, latch: FailureLatch) -> None:
        self._latch = latch
        self._condition = threading.Condition(lock)
        self._waiting = 0
        self._listeners: list[Callable[[], None]] = []
        self.number = 0
        # The latch lives as long as the run, and must not keep a holder that another one has taken the place of.
        this = weakref.ref(self)
        latch.subscribe(lambda failure: _wake(this()))

    def wait(self, seen: int) -> None:
        """Waits until `number` is no longer ``seen``, or the run fails."""
        with self._condition:
            self._waiting += 1
            try:
                while self.number == seen and self._latch.failure is None:
                    self._condition.wait()
            finally:
                self._waiting -= 1

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` after every change, in the thread that made it and under the lock; must be quick."""
        with self._condition:
            self._listeners.append(listener)

    def tell(self) -> None:
        """Notes a change; called under the lock."""
        self.number += 1
        if self._waiting:
            self._condition.notify_all()
        for listener in self._listeners:
            listener()


def _wake(changes: Changes | None) -> None:
    """Lets the threads that wait see that the run has failed."""
    if changes is not None:
        with changes._condition:
            changes.tell()
