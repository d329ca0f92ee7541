"""A rank in a process that an engine owns: its function runs, and nothing is started or ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.strategies.owned_launcher import OwnedLauncher


class Owner:
    name = "An engine"

    def __init__(self) -> None:
        self.errors: list[WorkerFailedError] = []

    def report(self, error: WorkerFailedError) -> None:
        self.errors.append(error)


class Strategy:
    """Notes in which order it is asked, and is the guard too."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failure: RunFailure | None = None

    def refuse_before_launch(self, trainer: object) -> None:
        self.calls.append("refuse")

    @contextmanager
    def guard_run(self) -> Iterator[None]:
        self.calls.append("guard")
        yield
        self.calls.append("end")


@pytest.fixture
def strategy() -> Strategy:
    return Strategy()


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def launcher(strategy: Any, owner: Owner) -> OwnedLauncher:
    return OwnedLauncher(strategy, strategy, owner)


def test_what_cannot_work_is_refused_before_the_function_runs_in_the_guard(
    strategy: Strategy, launcher: OwnedLauncher
) -> None:
    trainer: Any = object()

    def fit(*args: Any, **kwargs: Any) -> Any:
        strategy.calls.append("run")
        return args, kwargs

    assert launcher.launch(fit, 1, trainer=trainer, b=2) == ((1,), {"b": 2})
    assert strategy.calls == ["refuse", "guard", "run", "end"]


def test_it_runs_in_any_thread_and_starts_and_ends_no_process(
    launcher: OwnedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started or ended")

    for module, name in [(os, "_exit"), (os, "kill"), (subprocess, "Popen"), (signal, "signal")]:
        monkeypatch.setattr(module, name, forbidden)
    found: list[str] = []

    def run() -> None:
        found.append(launcher.launch(lambda: threading.current_thread().name))
        launcher.kill(signal.SIGTERM)
        launcher.interrupt()

    thread = threading.Thread(target=run, name="training")
    thread.start()
    thread.join()

    assert found == ["training"]


def test_the_owner_is_told_of_a_failure_that_the_ranks_thread_does_not_come_back_to(
    strategy: Strategy, launcher: OwnedLauncher, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    strategy.failure = RunFailure(2, "it is gone")

    launcher.exit_process(1)

    assert [error.failure for error in owner.errors] == [strategy.failure]
    assert exits == []


def test_a_rank_that_waits_for_the_others_says_who_starts_them(launcher: OwnedLauncher) -> None:
    assert launcher.describe_start(num_nodes=1).startswith("An engine starts them")
