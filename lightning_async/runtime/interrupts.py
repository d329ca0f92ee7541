"""Ctrl+C while ranks start: it ends the run at once, and only the process that starts them says so."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

__all__ = [
    "INTERRUPTED",
    "ending_at_once",
    "held_back",
    "interruptible",
    "leave_interrupted",
    "let_through",
    "rank_of_environment",
    "say_interrupted",
]

# The exit status that shells give to a process which Ctrl+C has ended.
INTERRUPTED = 128 + signal.SIGINT

_GRACE_S = 1.0


class _Note:
    """Notes that Ctrl+C was pressed, in the place of a handler that would raise.

    Args:
        instead_of: that handler.
    """

    def __init__(self, instead_of: Any) -> None:
        self.instead_of = instead_of
        self.pressed = False

    def __call__(self, signum: int, frame: object) -> None:
        self.pressed = True


@contextmanager
def held_back() -> Iterator[None]:
    """Has the processes that are started meanwhile hold Ctrl+C back until `let_through`; this one until the end.

    A process that is importing can only answer it with a traceback, and one that was half started would be nobody's.

    Raises:
        KeyboardInterrupt: at the end, if it was pressed meanwhile.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Another thread may hear of it, for which Python lets the main thread answer.
    note: _Note | None = None
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        note = _Note(handler)
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if note is not None:
            signal.signal(signal.SIGINT, note.instead_of)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    if note is not None and note.pressed:
        raise KeyboardInterrupt


def say_interrupted() -> None:
    """Says in one line that Ctrl+C has ended the run."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()


def rank_of_environment() -> str:
    """This process's rank, as what has started it says; "0" where nothing did."""
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"


def _say_if_first() -> None:
    if rank_of_environment() == "0":
        say_interrupted()


def leave_interrupted() -> NoReturn:
    """Ends this process after Ctrl+C; the first of a run's processes says so.

    Raises:
        SystemExit: with status 130.
    """
    # A second Ctrl+C must not interrupt the interpreter's own clearing up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _say_if_first()
    raise SystemExit(INTERRUPTED) from None


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Has Ctrl+C end this process while it imports, and the first of a run's processes say so.

    Raised in the middle of an import, it may be swallowed by other people's code, which then is half imported.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(signum: int, frame: object) -> NoReturn:
    _say_if_first()
    # There is nothing to clear up yet.
    os._exit(INTERRUPTED)


def let_through() -> None:
    """Lets Ctrl+C through from here on.

    Raises:
        KeyboardInterrupt: if it was pressed while it was held back.
    """
    note = signal.getsignal(signal.SIGINT)
    if isinstance(note, _Note):
        # In a process that was forked meanwhile.
        signal.signal(signal.SIGINT, note.instead_of)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def interruptible(act: Callable[[], object], grace_s: float = _GRACE_S) -> Iterator[None]:
    """Acts on Ctrl+C although the main thread may be in a call that no signal interrupts, such as a rendezvous.

    Args:
        act: called by another thread, if the main thread does not leave the block by itself.
        grace_s: how many seconds it has for that.
    """
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not handled:
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while signals := heard.recv(64):
            if signal.SIGINT in signals:
                if not over.wait(grace_s):
                    act()
                return

    watcher = threading.Thread(target=watch, name="interrupts", daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(previous)
        told.close()
        watcher.join()
        heard.close()
