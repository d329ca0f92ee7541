"""A clock that can be paused."""

from __future__ import annotations

import time

__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds since its creation, with the pauses and without them."""

    def __init__(self) -> None:
        self._started_s = self._resumed_s = time.perf_counter()
        self._before_s = 0.0
        self._paused = False

    def pause(self) -> None:
        """Stops `running_s`; nothing if it stands."""
        if not self._paused:
            self._before_s += time.perf_counter() - self._resumed_s
            self._paused = True

    def resume(self) -> None:
        """Lets `running_s` go on; nothing if it runs."""
        if self._paused:
            self._resumed_s = time.perf_counter()
            self._paused = False

    @property
    def running_s(self) -> float:
        """Seconds without the pauses."""
        return self._before_s + (0.0 if self._paused else time.perf_counter() - self._resumed_s)

    @property
    def total_s(self) -> float:
        """Seconds with the pauses."""
        return time.perf_counter() - self._started_s
