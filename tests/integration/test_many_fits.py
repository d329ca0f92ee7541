"""A process that fits many times keeps nothing of a fit: no module, descriptor, mapping, thread or callback."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_async import AsyncAMSGradStrategy, AsyncMonitor
from tests.every_rank import run_on_every_rank
from tests.launch import launch, report, run_as_script
from tests.models import TinyClassifier, fork_trainer, loader

pytestmark = pytest.mark.timeout(300)

# What a fit keeps is there once more after each; `make soak` goes on for longer.
many = pytest.mark.parametrize("fits", [6, pytest.param(20, marks=pytest.mark.soak)])
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Measured(TinyClassifier):
    """With a metric, which the strategy patches."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)


def fit_and_watch(folder: Path, strategy: AsyncAMSGradStrategy, ranks: int) -> list[weakref.ref[Any]]:
    callbacks = [AsyncMonitor(trace="trace.json", folder=folder), ModelCheckpoint(folder, every_n_train_steps=8)]
    trainer = fork_trainer(
        folder, ranks, strategy, max_epochs=2, enable_checkpointing=True, callbacks=callbacks, enable_progress_bar=True
    )
    module, train, validation = Measured(), loader(64), loader(16)
    trainer.fit(module, train, validation)
    watched = (trainer, strategy, module, train, validation, *callbacks, *trainer.optimizers)
    return [weakref.ref(each) for each in watched]


def resources(watched: list[weakref.ref[Any]]) -> dict[str, Any]:
    """What this process has, after a look for garbage."""
    gc.collect()
    return {
        "alive": [type(each()).__name__ for each in watched if each() is not None],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared mappings": Path("/proc/self/maps").read_text().count("/memfd:"),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "callbacks at exit": atexit._ncallbacks(),
        "signal handlers": [
            repr(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        ],
        "import hooks": len(sys.meta_path),
        "metrics": Metric.sync.__qualname__,
        "switch interval": sys.getswitchinterval(),
    }


def fit_many_times(folder: Path, ranks: int, fits: int, **options: Any) -> None:
    """Reports what this process has after the second of the fits, and after the last."""
    watched: list[weakref.ref[Any]] = []
    seen = []
    for fit in range(fits):
        watched += fit_and_watch(folder / f"fit{fit}", AsyncAMSGradStrategy(summary=False, **options), ranks)
        seen.append(resources(watched))
    report(folder, int(os.environ.get("LOCAL_RANK", "0")), fits=fits, early=seen[1], late=seen[-1])


def assert_flat(fits: int, early: dict[str, Any], late: dict[str, Any]) -> None:
    # The allocator maps something anew now and then, and Gloo (of the process group) closes its sockets a moment later;
    # what each fit keeps would be more.
    for name in ("mappings", "descriptors"):
        assert late.pop(name) < early.pop(name) + fits - 2, name
    assert late == early
    assert late["alive"] == []
    assert late["shared mappings"] == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "shared memory": {},
    "tcp, two slots": {"transport": "tcp", "overlap": True},
    "a process of its own": {"holder": "process"},
}


@many
def test_a_process_that_fits_alone_keeps_nothing(tmp_path: Path, fits: int) -> None:
    run = launch(lambda folder: fit_many_times(folder, 1, fits), tmp_path, timeout_s=240.0)

    assert run.returncode == 0, run.output
    assert_flat(**run.report(0))


@many
@pytest.mark.parametrize(
    "options", [*OPTIONS][:1] + [pytest.param(name, marks=pytest.mark.soak) for name in [*OPTIONS][1:]]
)
def test_ranks_that_fit_many_times_keep_nothing(tmp_path: Path, options: str, fits: int) -> None:
    run = launch(
        lambda folder: run_on_every_rank(2, lambda: fit_many_times(folder, 2, fits, **OPTIONS[options])),
        tmp_path,
        timeout_s=240.0,
    )

    assert run.returncode == 0, run.output
    for rank in run.reports():
        assert_flat(**rank)


@many
def test_the_process_that_starts_ranks_keeps_nothing(tmp_path: Path, fits: int) -> None:
    run = launch(lambda folder: fit_many_times(folder, 2, fits, start_method="fork"), tmp_path, timeout_s=240.0)

    assert run.returncode == 0, run.output
    assert_flat(**run.report(0))


SCRIPT = """
import sys
from pathlib import Path
from tests.integration.test_many_fits import fit_many_times

fit_many_times(Path.cwd(), 2, int(sys.argv[1]))
"""


@pytest.mark.soak
@many
def test_ranks_of_a_script_keep_nothing(tmp_path: Path, fits: int) -> None:
    """The first of its trainers starts the ranks, and watches over them."""
    (tmp_path / "train.py").write_text(SCRIPT)

    run = launch(lambda folder: run_as_script(folder / "train.py", str(fits)), tmp_path, timeout_s=240.0)

    assert run.returncode == 0, run.output
    for rank in run.reports():
        assert_flat(**rank)


def kinds_of_descriptors() -> dict[str, int]:
    """How many descriptors of each kind this process has open."""
    kinds: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            kinds[os.readlink(f"/proc/self/fd/{descriptor}").partition(":")[0].partition("-")[0]] += 1
    return {kind: kinds[kind] for kind in ("pipe", "/memfd")}


def fit_and_keep(folder: Path, fits: int, **options: Any) -> None:
    """Reports the descriptors after each fit, while all trainers are kept and nothing looks for garbage."""
    gc.disable()
    kept, seen = [], []
    for _ in range(fits):
        trainer = fork_trainer(folder, 2, AsyncAMSGradStrategy(summary=False, **options), max_epochs=1)
        trainer.fit(TinyClassifier(), loader(16))
        kept.append(trainer)
        seen.append(kinds_of_descriptors())
    report(folder, int(os.environ.get("LOCAL_RANK", "0")), seen=seen)


@pytest.mark.parametrize("fits", [2, pytest.param(60, marks=pytest.mark.soak)])
def test_forked_fits_leave_no_pipe_in_the_process_that_starts_them(tmp_path: Path, fits: int) -> None:
    run = launch(lambda folder: fit_and_keep(folder, fits, start_method="fork"), tmp_path, timeout_s=280.0)

    assert run.returncode == 0, run.output
    seen = run.report(0)["seen"]
    assert seen == [seen[0]] * fits


@pytest.mark.soak
def test_fits_with_a_holder_of_their_own_leave_no_memory_open(tmp_path: Path) -> None:
    run = launch(
        lambda folder: run_on_every_rank(2, lambda: fit_and_keep(folder, 40, holder="process")),
        tmp_path,
        timeout_s=280.0,
    )

    assert run.returncode == 0, run.output
    assert {seen["/memfd"] for seen in run.report(0)["seen"]} == {0}
