"""Ctrl+C while ranks start: it ends the run at once, and only the process that starts them says so."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = [
    "INTERRUPTED",
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


@contextmanager
def held_back() -> Iterator[None]:
    """Has the processes that are started meanwhile hold Ctrl+C back until `let_through`.

    A process that is importing can only answer it with a traceback. In this one another thread may hear of it.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def say_interrupted() -> None:
    """Says in one line that Ctrl+C has ended the run."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()


def rank_of_environment() -> str:
    """This process's rank, as what has started it says; "0" where nothing did."""
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"


def leave_interrupted() -> NoReturn:
    """Ends this process after Ctrl+C; the first of a run's processes says so.

    Raises:
        SystemExit: with status 130.
    """
    # A second Ctrl+C must not interrupt the interpreter's own clearing up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if rank_of_environment() == "0":
        say_interrupted()
    raise SystemExit(INTERRUPTED) from None


def let_through() -> None:
    """Lets Ctrl+C through from here on.

    Raises:
        KeyboardInterrupt: if it was pressed while it was held back.
    """
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
