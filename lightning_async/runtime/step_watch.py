"""Which worker computes too slowly, by its own past or by a limit: decisions, without threads, clocks and tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from lightning_async.runtime.health import Sick

__all__ = ["StepWatch"]

# Steps that are compared with those before, and as many times so many have to be there.
_WINDOW, _NEEDED_WINDOWS = 10, 3
# Medians that a worker's past is kept as.
_WINDOWS_KEPT = 100


@dataclass
class _Pace:
    window: list[float] = field(default_factory=list)
    past: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOWS_KEPT))


class StepWatch:
    """Times each worker's steps: from the parameters that it was given until its gradient is here.

    Waiting for the holder and for other workers is no part of a step; fetching the batch is.

    Args:
        timeout_s: a worker whose step takes longer is sick, also while it takes; None sets no limit.
        max_slowdown: a worker whose last ten steps take so many times as long as those before, by their medians, is
            sick; None compares nothing.

    Examples:
        >>> watch = StepWatch(timeout_s=30.0)
        >>> watch.begin(worker=2, slot=0, now_s=100.0)
        >>> watch.overdue(now_s=130.0)
        []
        >>> [sick.worker for sick in watch.overdue(now_s=131.0)]
        [2]
    """

    def __init__(self, timeout_s: float | None = None, max_slowdown: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._max_slowdown = max_slowdown
        self._began: dict[tuple[int, int], float] = {}
        self._paces: dict[int, _Pace] = {}

    def begin(self, worker: int, slot: int, now_s: float) -> None:
        """A worker was given parameters.

        Args:
            worker: the worker.
            slot: which of its slots.
            now_s: the time, by a clock that does not jump.
        """
        self._began[worker, slot] = now_s

    def end(self, worker: int, slot: int, now_s: float) -> Sick | None:
        """Its gradient is here; returns the worker if it has become too slow.

        Args:
            worker: the worker.
            slot: which of its slots.
            now_s: the time.
        """
        began_s = self._began.pop((worker, slot), None)
        if began_s is None or self._max_slowdown is None:
            return None
        pace = self._paces.setdefault(worker, _Pace())
        pace.window.append(now_s - began_s)
        if len(pace.window) < _WINDOW:
            return None
        last_s, pace.window = median(pace.window), []
        before_s = median(pace.past) if len(pace.past) >= _NEEDED_WINDOWS else None
        pace.past.append(last_s)
        if before_s is None or last_s <= self._max_slowdown * before_s:
            return None
        return Sick(
            worker,
            f"its last {_WINDOW} steps took {last_s:.3g} s each, {last_s / max(before_s, 1e-9):.1f} times as long as "
            f"its steps before, and max_slowdown is {self._max_slowdown:g}. Look at what else runs on its host",
        )

    def leave(self, worker: int, slot: int) -> None:
        """A worker computes nothing more for a while."""
        self._began.pop((worker, slot), None)

    def forget(self, worker: int) -> None:
        """Forgets a worker that is gone; one that comes in its place has a past of its own."""
        self._paces.pop(worker, None)
        for key in [key for key in self._began if key[0] == worker]:
            del self._began[key]

    def overdue(self, now_s: float) -> list[Sick]:
        """The workers whose step takes longer than it may; each is told once.

        Args:
            now_s: the time.
        """
        if self._timeout_s is None:
            return []
        # A copy: other threads begin and end steps.
        late = [key for key, began_s in list(self._began.items()) if now_s - began_s > self._timeout_s]
        for key in late:
            self._began.pop(key, None)
        reason = (
            f"it has computed one step for more than {self._timeout_s:g} s (step_timeout), with signs of life all the "
            "while. Look at its data and its host, or allow more"
        )
        return [Sick(worker, reason) for worker in dict.fromkeys(worker for worker, _ in late)]
