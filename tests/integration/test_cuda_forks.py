"""Forks of a process that has asked for CUDA, on a host without GPUs: the tests' own, and a user's.

A CUDA build of torch counts each as a bad fork, GPU or not. A CPU build does not, so there the count is made here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from packaging.version import Version

from tests.cuda import count_gpus
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader
from tests.soaked import soaked

STRATEGIES = ["ddp_fork", "ddp_notebook", "async_fork", "async_amsgrad_fork", "async_amsgrad_notebook"]
RANKS = 2
LIGHTNING_LOOKS_AT_FORKS = Version(lightning.__version__) > Version("2.6.0")

cuda: Any = torch.cuda


def in_fork(question: Callable[[], bool]) -> bool:
    """The answer of a fork of this process."""
    process = os.fork()
    if process == 0:
        os._exit(question())
    return bool(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


def ask_for_cuda(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Leaves this process as it is after ``torch.cuda.is_available()`` with a CUDA build, whatever this build is."""
    cuda.is_available()
    if not in_fork(lambda: cuda._is_in_bad_fork()):
        here = os.getpid()
        patch(cuda, "_is_in_bad_fork", lambda: os.getpid() != here)


class Module(TinyClassifier):
    """Reports from each rank what its fork counts as, and what it has trained."""

    def on_train_end(self) -> None:
        bad = cuda._is_in_bad_fork()
        report(Path.cwd(), self.global_rank, bad=bad, parameters=self.flat_parameters(), batches=self.batches)


def fit_twice(folder: Path, strategy: str) -> None:
    """What a notebook does: one Trainer after the other, with validation before training and after it."""
    module = Module()
    for _ in range(2):
        trainer = fork_trainer(folder, RANKS, strategy, num_sanity_val_steps=1)
        trainer.fit(module, loader(32), loader(16))
    fork_trainer(folder, RANKS, strategy).validate(module, loader(16), verbose=False)


def test_the_tests_can_launch_ranks_after_cuda_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for_cuda(monkeypatch.setattr)
    assert in_fork(cuda._is_in_bad_fork)

    run = launch(lambda folder: fit_twice(folder, "async_amsgrad_fork"), tmp_path)

    assert run.returncode == 0, run.output
    assert [rank["bad"] for rank in run.reports()] == [True] * RANKS


def test_a_launched_script_may_start_ranks_and_its_forks_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(folder: Path) -> None:
        report(folder, 0, script=cuda._is_in_bad_fork(), fork=in_fork(cuda._is_in_bad_fork))

    ask_for_cuda(monkeypatch.setattr)

    run = launch(script, tmp_path)

    assert run.report(0) == {"script": False, "fork": True}


def test_where_there_is_a_gpu_a_bad_fork_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for_cuda(monkeypatch.setattr)
    monkeypatch.setattr(cuda, "is_available", lambda: True)

    run = launch(lambda folder: report(folder, 0, bad=cuda._is_in_bad_fork()), tmp_path)

    assert run.report(0) == {"bad": True}


def test_gpus_are_counted_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device_count() -> int:
        (tmp_path / "asked").write_text(str(os.getpid()))
        return 3

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(cuda, "device_count", device_count)

    assert count_gpus() == 3
    assert int((tmp_path / "asked").read_text()) != os.getpid()


@pytest.mark.parametrize("strategy", soaked(STRATEGIES, "ddp_notebook", "async_fork"))
@pytest.mark.compatibility("Tools", "ranks forked by a process that has asked for CUDA, on CPUs")
def test_ranks_on_cpus_are_forked_after_cuda_was_asked_for(tmp_path: Path, strategy: str) -> None:
    def script(folder: Path) -> None:
        ask_for_cuda()
        fit_twice(folder, strategy)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first, second = run.reports()
    assert first["bad"] and second["bad"]
    assert torch.equal(first["parameters"], second["parameters"])


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if not name.startswith("ddp")])
@pytest.mark.compatibility(
    "Refused",
    "forking ranks in a fork of a process that has asked for CUDA",
    "refused",
    "As under `ddp_fork`, also on CPUs: torch could not initialise CUDA there. Take `async_amsgrad_spawn`. "
    "(Lightning 2.6.0 lets both.)",
)
def test_a_fork_of_a_process_that_has_asked_for_cuda_forks_ranks_only_if_ddp_does(
    tmp_path: Path, strategy: str
) -> None:
    def script(folder: Path) -> None:
        ask_for_cuda()
        for name in ("ddp_fork", strategy):
            if os.fork() == 0:
                outcome = "trained"
                try:
                    fork_trainer(folder, RANKS, name).fit(Module(), loader(32))
                except RuntimeError as error:
                    outcome = str(error)
                (folder / name).write_text(outcome)
                os._exit(0)
            os.wait()

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    expected, found = ((tmp_path / name).read_text() for name in ("ddp_fork", strategy))
    assert found == expected
    assert found.startswith("Cannot re-initialize CUDA in forked subprocess") == LIGHTNING_LOOKS_AT_FORKS
