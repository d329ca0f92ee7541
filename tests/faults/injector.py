"""Faults as data, and the callback that makes them happen."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Fault", "FaultInjector", "InjectedError", "Kind"]

Kind = Literal["raise", "kill", "stop", "exit", "interrupt", "sigterm", "sigterm_all"]


class InjectedError(Exception):
    """The error that a test has ordered; not a RuntimeError, which the package might take for a lost peer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Args:
        rank: where.
        step: at which call of ``place`` in that rank, counted from 0.
        kind: ``raise`` an error, ``kill`` or ``stop`` the process with the signals of those names, ``exit`` with
            code 3, ``interrupt`` (Ctrl+C) or ``sigterm_all`` the whole process group, ``sigterm`` the rank alone.
        place: the LightningModule's method in which it happens, or ``setup``.
    """

    rank: int
    step: int
    kind: Kind
    place: str = "training_step"

    def strike(self) -> None:
        """Makes it happen, in the calling process."""
        if self.kind == "raise":
            raise InjectedError(f"injected into {self.place}")
        if self.kind == "exit":
            sys.exit(3)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "interrupt":
            os.killpg(os.getpgrp(), signal.SIGINT)
        elif self.kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "sigterm_all":
            os.killpg(os.getpgrp(), signal.SIGTERM)


class FaultInjector(Callback):
    """Lets faults strike the ranks that they are meant for.

    The module's methods are replaced on the instance when a fit begins, in the rank's own process; so one injector
    serves every way of starting ranks.

    Args:
        faults: what goes wrong.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for fault in self.faults:
            if fault.rank != trainer.global_rank:
                continue
            if fault.place == "setup":
                fault.strike()
            else:
                method = getattr(pl_module, fault.place)
                setattr(pl_module, fault.place, _struck(method, fault))


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
