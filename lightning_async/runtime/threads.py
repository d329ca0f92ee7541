"""What threads ask of torch and of the interpreter."""

from __future__ import annotations

import gc
import logging
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

__all__ = ["Errands", "PromptSwitching", "frame_of", "use_one_thread"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Ten times as often as Python does by itself. Each request takes the interpreter's lock several times, and each time
# has to wait for so long while rank 0's training runs pure Python.
SWITCH_INTERVAL_S = 0.5e-3

_looking = threading.Lock()


def use_one_thread() -> None:
    """Limits torch to one intra-op thread in the calling thread, and nowhere else.

    The fused update is at the memory's speed with one thread, and a second one costs a scheduler tick on a busy
    machine. ``torch.set_num_threads`` reaches every thread that has not used torch's own thread pool yet, and would
    slow rank 0's training down.
    """
    # torch sets the number once per thread, at its first use there; after that the limit stays.
    torch.get_num_threads()
    threadpool_limits(limits=1, user_api="openmp")


def frame_of(thread: int | None) -> FrameType | None:
    """Where a thread is; None if there is no such thread.

    ``sys._current_frames`` holds a lock of the interpreter's that each thread needs to start another one. Before Python
    3.12.3 (CPython issue 106883) a garbage collection may begin in there; what it frees may let another thread run, and
    if that starts one the process stands still for good.

    Args:
        thread: its identity.
    """
    with _looking:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(thread or 0)
        finally:
            if collects:
                gc.enable()


class PromptSwitching:
    """Lets rank 0's threads take the interpreter's lock from each other sooner, for as long as workers are served.

    The interval is the whole process's (`sys.setswitchinterval`); the one of before comes back with `stop`. An interval
    that is shorter already stays.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: float | None = None

    def start(self) -> None:
        """Shortens the interval; idempotent."""
        with self._lock:
            if self._before is None and (before := sys.getswitchinterval()) > SWITCH_INTERVAL_S:
                self._before = before
                sys.setswitchinterval(SWITCH_INTERVAL_S)

    def stop(self) -> None:
        """Brings the former interval back; idempotent."""
        with self._lock:
            if self._before is not None:
                sys.setswitchinterval(self._before)
                self._before = None


class Errands:
    """A thread that runs what it is given, one after the other; it is there before there is something to run.

    A thread for each errand could not be started where it is most needed: in a process that has no memory left.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._errands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; idempotent.

        Raises:
            RuntimeError: if the process may not have another one.
        """
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

    def run(self, errand: Callable[[], object]) -> None:
        """Has it run soon."""
        self._errands.put(errand)

    def submit(self, errand: Callable[[], _T]) -> Future[_T]:
        """Has it run soon; what it returns or raises is the future's."""
        future: Future[_T] = Future()

        def work() -> None:
            try:
                future.set_result(errand())
            except BaseException as error:
                # For the thread that asks for the result.
                future.set_exception(error)

        self.run(work)
        return future

    def close(self, timeout_s: float) -> None:
        """Waits up to ``timeout_s`` seconds for the errands under way; idempotent."""
        self._errands.put(None)
        with self._lock:
            if self._thread.ident is not None:
                self._thread.join(timeout_s)

    def _work(self) -> None:
        while (errand := self._errands.get()) is not None:
            try:
                errand()
            except Exception:  # noqa: PERF203  # the next one is another matter
                log.exception("lightning_async: an errand of %s failed", threading.current_thread().name)
