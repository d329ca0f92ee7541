"""What is to be done some seconds from now, by a thread that runs already.

`threading.Timer` starts a thread when it is set. A process that has no memory left, or whose number of threads is
limited, cannot start one, and this is just when a run must be ended; so all alarms of a process share one thread, which
is there from the first of them on.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable

__all__ = ["Alarm"]

log = logging.getLogger(__name__)

# After there was no memory even to look at the time.
_BREATH_S = 0.1


class Alarm:
    """Calls ``act`` in the alarms' thread when the time that was set has passed; `close` it in the end.

    Args:
        act: what to do, once for each `set`, which it may call; must be quick, or the last thing that this
            process does.
    """

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.due_s = math.inf
        self._clock = _clock_of_this_process()
        self._clock.add(self)

    def set(self, delay_s: float) -> None:
        """Acts ``delay_s`` seconds from now, in place of the time that was set before."""
        self.due_s = time.monotonic() + delay_s
        self._clock.look_again()

    def close(self) -> None:
        """Acts no more; idempotent."""
        self.due_s = math.inf
        self._clock.remove(self)


class _Clock:
    """The thread of all alarms of a process, which lives as long as that."""

    def __init__(self) -> None:
        self._alarms: list[Alarm] = []
        self._changed = threading.Event()
        threading.Thread(target=self._run, name="alarms", daemon=True).start()

    def add(self, alarm: Alarm) -> None:
        self._alarms.append(alarm)

    def remove(self, alarm: Alarm) -> None:
        if alarm in self._alarms:
            self._alarms.remove(alarm)

    def look_again(self) -> None:
        self._changed.set()

    def _run(self) -> None:
        while True:
            try:
                self._wait()
                self._act()
            except MemoryError:  # noqa: PERF203  # the next round may find some
                time.sleep(_BREATH_S)

    def _wait(self) -> None:
        # A method of its own: while it waits, no variable keeps an alarm that was closed.
        next_s = min((alarm.due_s for alarm in self._alarms), default=math.inf)
        self._changed.wait(None if next_s == math.inf else max(0.0, next_s - time.monotonic()))
        self._changed.clear()

    def _act(self) -> None:
        for alarm in list(self._alarms):
            if (due_s := alarm.due_s) <= time.monotonic():
                # Before it acts: it may set itself again.
                alarm.due_s = math.inf
                try:
                    alarm.act()
                except MemoryError:
                    alarm.due_s = due_s
                    raise
                except Exception:
                    log.exception("lightning_async: what was due could not be done")


_creating = threading.Lock()
_clock: _Clock | None = None


def _clock_of_this_process() -> _Clock:
    global _clock
    with _creating:
        if _clock is None:
            _clock = _Clock()
        return _clock


def _forget_clock() -> None:
    # Threads do not survive a fork.
    global _creating, _clock
    _creating, _clock = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_clock)
