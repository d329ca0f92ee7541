"""Faults as data, and the callback that makes them happen."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_async.runtime.admission import Invitation

__all__ = ["Fault", "FaultInjector", "InjectedError", "Kind", "pid_of"]

Kind = Literal["raise", "kill", "stop", "exit", "interrupt", "sigterm", "sigterm_all", "exhaust", "threadless"]

# Less than a thread's stack.
_LEFT_BYTES = 4 * 2**20


class InjectedError(Exception):
    """The error that a test has ordered; not a RuntimeError, which the package might take for a lost peer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Args:
        rank: where.
        step: at which call of ``place`` in that rank, counted from 0.
        kind: ``raise`` an error, ``kill`` or ``stop`` the process with the signals of those names, ``exit`` with code
            3, ``interrupt`` (Ctrl+C) or ``sigterm_all`` the whole process group, ``sigterm`` the rank alone,
            ``exhaust`` the memory until nothing is left, ``threadless``: no thread can be started from here on, and
            nothing is raised.
        place: the LightningModule's method in which it happens, or ``setup``.
        after_s: seconds to wait first, in which the other ranks come to wait for this one.
        incarnation: which worker of that rank it happens to: 0 for those that the run begins with, 1 for those that
            have joined it.
    """

    rank: int
    step: int
    kind: Kind
    place: str = "training_step"
    after_s: float = 0.0
    incarnation: int = 0

    def strike(self) -> None:
        """Makes it happen, in the calling process."""
        time.sleep(self.after_s)
        if self.kind == "raise":
            raise InjectedError(f"injected into {self.place}")
        if self.kind == "exit":
            sys.exit(3)
        if self.kind == "exhaust":
            exhaust_memory()
        if self.kind == "threadless":
            refuse_threads()
            return
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
        number = signals.get(self.kind, signal.SIGTERM)
        if self.kind in ("interrupt", "sigterm_all"):
            os.killpg(os.getpgrp(), number)
        else:
            os.kill(os.getpid(), number)


class FaultInjector(Callback):
    """Lets faults strike the ranks that they are meant for, and leaves each rank's process id in a file.

    The module's methods are replaced on the instance when a fit begins, in the rank's own process; so one injector
    serves every way of starting ranks.

    Args:
        faults: what goes wrong.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for fault in self.faults:
            joined = Invitation.of_this_process() is not None
            if fault.rank != trainer.global_rank or fault.incarnation != joined:
                continue
            if fault.place == "setup":
                fault.strike()
            else:
                method = getattr(pl_module, fault.place)
                setattr(pl_module, fault.place, _struck(method, fault))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        note = Path(f"pid-{trainer.global_rank}")
        if not note.exists():
            note.write_text(str(os.getpid()))


def exhaust_memory() -> None:
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


def refuse_threads() -> None:
    """From here on this process can start no thread."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[method-assign]


def pid_of(folder: Path, rank: int, timeout_s: float = 40.0) -> int:
    """The process id of a rank that has computed its first batch; waits for it."""
    deadline = time.monotonic() + timeout_s
    note = folder / f"pid-{rank}"
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline, f"rank {rank} has computed nothing in {timeout_s} s"
        time.sleep(0.02)
    return int(note.read_text())


def _struck(method: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.step + 1:
            fault.strike()
        return method(*args, **kwargs)

    return wrapper
