"""How one rank's failure becomes every rank's end: a latch that keeps the first failure, and a guard on exit.

A failure may be that there is no memory left, and then nothing can be started any more and little be allocated. So what
ends a run is made ready when the run begins: threads that wait, and memory that is given back at the failure.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from lightning_async.runtime.alarms import Alarm

__all__ = [
    "ExitGuard",
    "FailureLatch",
    "RunFailure",
    "WorkerFailedError",
    "describe_error",
    "describe_exit",
    "end_process",
    "say",
    "tell",
    "tell_in_one_line",
]

log = logging.getLogger(__name__)

# Address space only: nothing of it is ever touched. Enough to describe an error, to send it, and for the interpreter
# and Lightning to print a traceback.
_RESERVE_BYTES = 32 * 2**20
_TRACEBACK = "\n\nTraceback"
# How long the heartbeat's news (who failed, and why) may trail a lost connection.
_NEWS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class RunFailure:
    """The first thing that went wrong in a run.

    Args:
        rank: the rank at fault.
        reason: what happened to it, in words that stand behind "rank 2 failed: ".
        announced: True if another process already tells the user, so that this one ends quietly.
        traced: True if the rank at fault has said so itself, and shows its traceback.
        lost: True if a process was killed, stopped or cut off, which need not come again.
    """

    rank: int
    reason: str
    announced: bool = False
    traced: bool = field(default=False, compare=False)
    lost: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.reason}"

    @property
    def in_short(self) -> str:
        """The reason without a traceback that came with it."""
        return self.reason.partition(_TRACEBACK)[0]


class WorkerFailedError(RuntimeError):
    """Another rank of the run failed; the message names it and the reason."""

    def __init__(self, failure: RunFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure

    def __reduce__(self) -> tuple[type[WorkerFailedError], tuple[RunFailure]]:
        return type(self), (self.failure,)


def tell(error: WorkerFailedError) -> tuple[str, str]:
    """What another rank's failure is told with: its traceback, if it comes with one, and one line.

    Examples:
        >>> tell(WorkerFailedError(RunFailure(1, "ValueError: no", traced=True)))
        ('', 'rank 1 failed: ValueError: no; its own traceback says where')
    """
    failure = error.failure
    reason = failure.in_short
    # Of a process that was started from this one and does not print it.
    traceback = failure.reason.removeprefix(reason).strip()
    where = "; its own traceback says where" if failure.traced else ""
    return traceback, f"rank {failure.rank} failed: {reason}{'; its traceback is above' if traceback else where}"


def tell_in_one_line() -> None:
    """Has the interpreter end with one line where another rank's failure is what ends this process.

    The rank at fault shows its traceback, and that of this one would show where it has waited.
    """
    previous = sys.excepthook
    if getattr(previous, "tells_in_one_line", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, WorkerFailedError):
            previous(kind, error, traceback)
            return
        theirs, line = tell(error)
        sys.stderr.write(f"{theirs}\n\n" if theirs else "")
        sys.stderr.write(f"{kind.__name__}: {line}\n")

    hook.tells_in_one_line = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def say(rank: int, text: str) -> None:
    """Prints one line of this rank's to stderr, in one write: other ranks print to the same terminal."""
    sys.stderr.write(f"[rank {rank}] lightning_async: {text}\n")
    sys.stderr.flush()


def describe_exit(code: int, process: str = "its process") -> str:
    """What became of a process, in words that stand behind "rank 2 failed: ".

    Examples:
        >>> describe_exit(-9), describe_exit(3)
        ('its process was killed by SIGKILL', 'its process exited with code 3')
    """
    if code < 0:
        return f"{process} was killed by {signal.Signals(-code).name}"
    return f"{process} exited with code {code}"


def describe_error(error: BaseException) -> str:
    """An error in words that stand behind "rank 2 failed: "; also one whose text cannot be made.

    Examples:
        >>> describe_error(ValueError("no")), describe_error(MemoryError())
        ('ValueError: no', 'MemoryError: out of memory')
    """
    name = type(error).__name__
    try:
        text = str(error)
    except Exception as another:
        # User code's own __str__, or no memory for a long text.
        return f"{name}, whose text could not be made: {type(another).__name__}"
    if not text and isinstance(error, MemoryError):
        text = "out of memory"
    return f"{name}: {text}" if text else name


class FailureLatch:
    """Keeps the first failure of a run and tells everyone who waits.

    Listeners are called once, in the thread that trips the latch, or at once if it has already tripped. One that raises
    keeps the others from nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tripped = threading.Event()
        self._failure: RunFailure | None = None
        self._listeners: list[Callable[[RunFailure], None]] = []
        self._reserve = mmap.mmap(-1, _RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    @property
    def failure(self) -> RunFailure | None:
        """The first failure, or None."""
        return self._failure

    def free_reserve(self) -> None:
        """Gives back the memory that was kept for a failure, or for the end of the run; idempotent."""
        self._reserve.close()

    def trip(self, failure: RunFailure) -> bool:
        """Records ``failure`` if it is the first; returns whether it was."""
        self.free_reserve()
        with self._lock:
            if self._failure is not None:
                return False
            self._failure = failure
            listeners, self._listeners = self._listeners, []
            self._tripped.set()
        for listener in listeners:
            try:
                listener(failure)
            except Exception as error:  # noqa: PERF203  # each by itself
                with contextlib.suppress(MemoryError):
                    log.warning("lightning_async: not everyone heard that %s: %r", failure, error)
        return True

    def subscribe(self, listener: Callable[[RunFailure], None]) -> None:
        """Calls ``listener`` with the first failure, now or later."""
        with self._lock:
            if self._failure is None:
                self._listeners.append(listener)
                return
            failure = self._failure
        listener(failure)

    def wait(self, timeout_s: float) -> RunFailure | None:
        """Waits up to ``timeout_s`` seconds for a failure; returns it, or None."""
        self._tripped.wait(timeout_s)
        return self._failure

    def explain_loss(self, otherwise: Callable[[], RunFailure]) -> RunFailure:
        """The failure behind a lost connection; afterwards the run has failed.

        Args:
            otherwise: the failure if the heartbeat reports none within a moment.
        """
        failure = self.wait(_NEWS_TIMEOUT_S)
        if failure is None:
            failure = otherwise()
            self.trip(failure)
        return self._failure or failure

    def check(self) -> None:
        """Raises if the run has failed.

        Raises:
            WorkerFailedError: with the first failure.
        """
        if self._failure is not None:
            raise WorkerFailedError(self._failure)


class ExitGuard:
    """Ends this process some seconds after a failure, whatever its main thread is stuck in.

    A main thread inside a collective whose peer is gone does not come back: no signal handler and no exception
    reaches it, and Gloo's own time-out is half an hour. The guard gives the main thread ``grace_s`` to raise the
    error itself (so that callbacks and loggers see it), then prints the one line that says why and ends the process.

    Args:
        rank: this process's rank, for the message.
        latch: the run's failure latch.
        grace_s: seconds between the failure and the forced end.
        exit_process: what ends the process; replaced in tests.
        before_exit: called with the failure just before that.
        ending: what is done then, in words.
    """

    def __init__(
        self,
        rank: int,
        latch: FailureLatch,
        grace_s: float = 5.0,
        exit_process: Callable[[int], object] = os._exit,
        before_exit: Callable[[RunFailure], object] = lambda failure: None,
        ending: str = "ending this process",
    ) -> None:
        self._rank = rank
        self._ending = ending
        self._latch = latch
        self._before_exit = before_exit
        self._exit_process = exit_process
        self._alarm = Alarm(self._end)
        latch.subscribe(lambda failure: self._alarm.set(grace_s))

    def disarm(self) -> None:
        """Leaves the end of this process to its main thread."""
        self._alarm.close()

    def _end(self) -> None:
        failure = self._latch.failure
        try:
            if failure is not None:
                self._before_exit(failure)
                if not failure.announced:
                    say(self._rank, f"{failure}; {self._ending}.")
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            end_process(self._exit_process)


def end_process(exit_process: Callable[[int], object] = os._exit) -> None:
    """Ends this process with code 1, whatever happens on the way."""
    try:
        exit_process(1)
    except BaseException:
        os._exit(1)
