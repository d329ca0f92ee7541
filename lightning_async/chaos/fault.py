"""A fault as data: what goes wrong, where, and in which worker. Knows neither Lightning nor the exchange."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_async.runtime.failure import say

__all__ = ["PLACES", "Counter", "Fault", "InjectedError", "Kind"]

Kind: TypeAlias = Literal[
    "raise", "kill", "stop", "pause", "exit", "interrupt", "sigterm", "sigterm_all", "exhaust", "threadless"
]

PLACES = {
    "setup": "before the exchange of gradients is set up",
    "handshake": "about to join a run: has asked to, reached the holder, heard the state, been let in",
    "draw": "batches have been asked for",
    "compute": "in training_step",
    "push": "the gradient is written, the push not sent",
    "mid-push": "the push is announced; of its payload, if it travels, a part has been sent",
    "parked": "the push is sent, and its answer has not come",
    "mid-pull": "the parameters are announced; of their payload, if it travels, nothing has been taken",
    "meeting": "about to bring something to a meeting of the ranks",
    "met": "has brought something, and does not know what the others have",
    "group": "about to form a process group with the ranks that are left",
    "collective": "about to call a collective of torch.distributed",
}
"""Places besides the methods of a LightningModule."""

# Less than a thread's stack.
_LEFT_BYTES = 4 * 2**20


class InjectedError(Exception):
    """The error that a fault has ordered; not a RuntimeError, which could be taken for a lost peer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Args:
        rank: where.
        step: at which passage of ``place`` in that process, counted from 0.
        kind: ``raise`` an error, ``kill`` or ``stop`` the process with the signals of those names, ``pause`` it for
            ``after_s`` seconds, ``exit`` with code 3, ``interrupt`` (Ctrl+C) or ``sigterm_all`` the whole process
            group, ``sigterm`` the rank alone, ``exhaust`` the memory until nothing is left, ``threadless``: no thread
            can be started from here on, and nothing is raised.
        place: one of `PLACES`, or the name of a method of the LightningModule.
        after_s: seconds to wait first, in which the other ranks come to wait for this one.
        incarnation: which worker of that rank it happens to: 0 is the one that the run begins with, 1 the first that
            is to take its place.

    Examples:
        >>> Fault(2, 20, "kill", "mid-push").place
        'mid-push'
        >>> Fault(2, 20, "kill", "training_step", incarnation=-1)
        Traceback (most recent call last):
        ValueError: step and incarnation of a fault are counted from 0, not 20 and -1
    """

    rank: int
    step: int
    kind: Kind
    place: str = "training_step"
    after_s: float = 0.0
    incarnation: int = 0

    def __post_init__(self) -> None:
        if self.step < 0 or self.incarnation < 0:
            told = f"{self.step} and {self.incarnation}"
            raise ValueError(f"step and incarnation of a fault are counted from 0, not {told}")

    def strike(self) -> None:
        """Makes it happen, in the calling process.

        Raises:
            InjectedError: if that is what was ordered.
        """
        say(self.rank, f"fault: {self.kind} at {self.place} {self.step}")
        if self.kind == "pause":
            _pause(self.after_s)
            return
        time.sleep(self.after_s)
        if self.kind == "raise":
            raise InjectedError(f"injected into {self.place}")
        if self.kind == "exit":
            sys.exit(3)
        if self.kind == "exhaust":
            _exhaust_memory()
        if self.kind == "threadless":
            _refuse_threads()
            return
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
        number = signals.get(self.kind, signal.SIGTERM)
        if self.kind in ("interrupt", "sigterm_all"):
            os.killpg(os.getpgrp(), number)
        else:
            os.kill(os.getpid(), number)


class Counter:
    """Counts the passages of one place, and lets the faults strike whose turn it is.

    Args:
        faults: those of the place.

    Examples:
        >>> draws = Counter([Fault(1, 1, "raise", "draw")])
        >>> draws.pass_by()
        >>> draws.pass_by()
        Traceback (most recent call last):
        lightning_async.chaos.fault.InjectedError: injected into draw
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = tuple(faults)
        self._passages = 0

    def pass_by(self) -> None:
        """The place is passed once more."""
        passage, self._passages = self._passages, self._passages + 1
        for fault in self._faults:
            if fault.step == passage:
                fault.strike()


def _pause(seconds: float) -> None:
    """Stops this process, threads and all, and has another one wake it."""
    me = os.getpid()
    if (waker := os.fork()) == 0:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(me, signal.SIGCONT)
        os._exit(0)
    os.kill(me, signal.SIGSTOP)
    os.waitpid(waker, 0)


def _exhaust_memory() -> None:
    """Lets this process have no more memory than it has now, and takes all of it.

    Raises:
        MemoryError: whose traceback keeps all that was taken.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _LEFT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    taken: list[Any] = []
    for size in (2**16, 2**10):
        with suppress(MemoryError):
            while True:
                taken.append(bytearray(size))
    while True:
        taken.append(bytearray(64))


def _refuse_threads() -> None:
    """From here on this process can start no thread."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[method-assign]
