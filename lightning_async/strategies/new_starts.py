"""All ranks are started anew after rank 0 was lost, and go on from what it, or the holder's process, has left."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_async.runtime.failure import WorkerFailedError
from lightning_async.runtime.job import NEW_STARTS_VARIABLE, RUN_VARIABLE
from lightning_async.runtime.launcher_connection import say_on_host
from lightning_async.runtime.restart_counts import Restarts
from lightning_async.runtime.roster import Resilience

__all__ = ["NewStarts"]


class NewStarts:
    """Whether, and how often, the ranks that were started from this process are started anew.

    Args:
        resilience: what becomes of the run when a rank is lost.
        is_possible: whether something is left to go on from.
        hint: what to tell a user of a run that goes on, and loses rank 0, where nothing is.

    Attributes:
        is_wanted: whether there is another start to be made.
    """

    def __init__(self, resilience: Resilience, is_possible: bool, hint: str = "") -> None:
        self._most = resilience.max_restarts
        self._hint = hint if resilience.goes_on and not is_possible else ""
        self._goes_on = resilience.goes_on and is_possible
        self._restarts = Restarts()
        self._count = 0
        self._delay_s = 0.0
        self.is_wanted = True

    @contextmanager
    def named(self) -> Iterator[None]:
        """Gives the run a name, by which a start knows the snapshot of the one before."""
        if not self._goes_on:
            yield
            return
        given = os.environ.get(RUN_VARIABLE)
        os.environ[RUN_VARIABLE] = given or uuid.uuid4().hex
        try:
            yield
        finally:
            os.environ.pop(NEW_STARTS_VARIABLE, None)
            if not given:
                del os.environ[RUN_VARIABLE]

    @contextmanager
    def attempt(self, is_lost: Callable[[], bool]) -> Iterator[None]:
        """One start: what it fails with is kept back if another one is to follow.

        Args:
            is_lost: whether rank 0 was killed, or had to be, unasked: an error of its own would come again.
        """
        self.is_wanted = False
        try:
            yield
        except WorkerFailedError as error:
            if error.failure.rank != 0 or not is_lost():
                raise
            told = f"rank 0 is lost: {error.failure.in_short}"
            if self._hint:
                say_on_host(0, f"{told}; {self._hint}")
            if not self._goes_on:
                raise
            count, delay_s = self._restarts.count(0)
            if count > self._most:
                say_on_host(0, f"{told}; it was started again {self._most} times in a row (max_restarts)")
                raise
            self._count += 1
            os.environ[NEW_STARTS_VARIABLE] = str(self._count)
            say_on_host(0, f"{told}; all ranks are started again, from the newest snapshot ({count} of {self._most})")
            self._delay_s, self.is_wanted = delay_s, True

    def wait(self) -> None:
        """Waits until the next start is due."""
        time.sleep(self._delay_s)
