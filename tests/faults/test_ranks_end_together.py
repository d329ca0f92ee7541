"""Nothing hangs: whatever happens to a rank, every process of the run ends soon, and one message says which and why."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_async.runtime import membership
from lightning_async.strategies import launching
from tests.faults.injector import Fault, pid_of
from tests.faults.runs import (
    FORK,
    POPEN,
    WORKER_TIMEOUT_S,
    assert_ended_well,
    explanations,
    start,
    start_interpreters,
    start_script,
)
from tests.faults.train import Run, train
from tests.launch import launch, report

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(0, 20, "raise"), "InjectedError: injected into training_step"),
        pytest.param(Fault(2, 20, "raise"), "InjectedError: injected into training_step", marks=pytest.mark.soak),
        (Fault(2, 3, "raise", "validation_step", after_s=0.3), "InjectedError: injected into validation_step"),
        pytest.param(
            Fault(0, 3, "raise", "validation_step", after_s=0.3),
            "InjectedError: injected into validation_step",
            marks=pytest.mark.soak,
        ),
        (Fault(2, 0, "raise", "setup"), "InjectedError: injected into setup"),
        pytest.param(
            Fault(2, 0, "raise", "on_fit_start"), "InjectedError: injected into on_fit_start", marks=pytest.mark.soak
        ),
        pytest.param(
            Fault(0, 0, "raise", "configure_optimizers"),
            "InjectedError: injected into configure_optimizers",
            marks=pytest.mark.soak,
        ),
        (Fault(2, 0, "raise", "configure_optimizers"), "InjectedError: injected into configure_optimizers"),
        (Fault(2, 1, "raise", "on_train_epoch_end"), "InjectedError: injected into on_train_epoch_end"),
        pytest.param(Fault(2, 20, "exit"), "SystemExit: 3", marks=pytest.mark.soak),
        (Fault(0, 20, "exit"), "SystemExit: 3"),
        (Fault(2, 20, "kill"), "its process was killed by SIGKILL"),
        (Fault(2, 3, "kill", "validation_step", after_s=0.3), "its process was killed by SIGKILL"),
        (Fault(2, 0, "kill", "on_fit_start"), "its process was killed by SIGKILL"),
    ],
    ids=lambda value: f"{value.kind}-{value.place}-rank{value.rank}" if isinstance(value, Fault) else "",
)
def test_a_failing_rank_is_named_and_ends_everyone(tmp_path: Path, fault: Fault, reason: str) -> None:
    run = start(Run((fault,), strategy=FORK), tmp_path)

    assert_ended_well(run)
    assert explanations(run.output) == [f"rank {fault.rank} failed: {reason}"]
    # Where in the user's code it was, once, after the message.
    assert run.output.count('raise InjectedError(f"injected into') == (1 if fault.kind == "raise" else 0)


@pytest.mark.parametrize("place", ["training_step", "validation_step"])
def test_when_rank_0_is_killed_the_others_end_and_say_why(tmp_path: Path, place: str) -> None:
    run = start(Run((Fault(0, 3, "kill", place, after_s=0.3),), strategy=FORK), tmp_path)

    assert_ended_well(run)
    said = explanations(run.output)
    assert said[-1] == "rank 0 failed: its process was killed by SIGKILL"
    # With rank 0 gone nobody can speak for all: one line each.
    assert all(line.startswith("rank 0 failed: its process is gone") for line in said[:-1])
    assert len(said) <= 3
    assert run.output.count("Traceback") == 1


@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_ranks_parked_at_the_barrier_are_woken(tmp_path: Path, kind: Any) -> None:
    strategy = FORK | {"max_staleness": 0}
    run = start(Run((Fault(2, 5, kind, after_s=0.4),), strategy=strategy), tmp_path)

    assert_ended_well(run)
    assert len(explanations(run.output)) == 1
    assert explanations(run.output)[0].startswith("rank 2 failed: ")


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_kill_from_outside_at_any_moment(tmp_path: Path, transport: str) -> None:
    def kill(session: int) -> None:
        pid = pid_of(tmp_path, 2)
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)

    run = start(Run(strategy=FORK | {"transport": transport}, sleep_s=()), tmp_path, meanwhile=kill)

    assert_ended_well(run)
    assert explanations(run.output) == ["rank 2 failed: its process was killed by SIGKILL"]


def test_a_kill_in_the_middle_of_a_large_payload(tmp_path: Path) -> None:
    def kill(session: int) -> None:
        pid = pid_of(tmp_path, 1)
        # Without a pause in the steps a rank spends most of its time in push and pull of these 18 MB.
        time.sleep(0.33)
        os.kill(pid, signal.SIGKILL)

    strategy = FORK | {"transport": "tcp"}
    run = start(Run(ranks=2, strategy=strategy, sleep_s=(0.2,), width=500_000), tmp_path, meanwhile=kill)

    assert_ended_well(run)
    assert explanations(run.output) == ["rank 1 failed: its process was killed by SIGKILL"]


def test_a_stopped_rank_is_named_after_worker_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other ranks are stuck with it in a collective until their exit guards end them, after 5 s; then the stopped
    # process, which would never end, has 8 s more.
    monkeypatch.setattr(membership, "_GRACE_S", 1.0)
    monkeypatch.setattr(launching, "END_TIMEOUT_S", 1.5)
    strategy = FORK | {"worker_timeout": WORKER_TIMEOUT_S}
    run = start(Run((Fault(2, 3, "stop"),), strategy=strategy), tmp_path)

    assert_ended_well(run)
    assert "rank 2 failed: gave no sign of life for 2 s (worker_timeout)" in run.output
    assert {line[:7] for line in explanations(run.output)} == {"rank 2 "}


@pytest.mark.parametrize("place", ["training_step", "validation_step"])
def test_ctrl_c_ends_every_rank_with_one_line(tmp_path: Path, place: str) -> None:
    run = start(Run((Fault(2, 3, "interrupt", place),), strategy=FORK), tmp_path)

    assert_ended_well(run)
    assert run.returncode == 130
    assert run.output.count("interrupted") == 1
    assert "KeyboardInterrupt" not in run.output
    assert "Traceback" not in run.output


@pytest.mark.compatibility("Loop", "SIGTERM", note="All ranks leave together, at the end of the batches that are out.")
@pytest.mark.parametrize(("rank", "kind"), [(0, "sigterm"), (2, "sigterm"), (2, "sigterm_all")])
def test_after_sigterm_all_ranks_leave_together(tmp_path: Path, rank: int, kind: Any) -> None:
    def script(folder: Path) -> None:
        from lightning.pytorch import Callback, LightningModule, Trainer

        from lightning_async.runtime.membership import Membership
        from lightning_async.strategies import supervisor as ranks

        trainers: list[Trainer] = []

        class Finder(Callback):
            def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
                trainers.append(trainer)

        class Reporting(Membership):
            def _explain(self, error: BaseException) -> BaseException:
                report(folder, self.rank, version=trainers[0].strategy.version, why=type(error).__name__)
                return super()._explain(error)

        ranks.Membership = Reporting  # type: ignore[misc]
        train(Run((Fault(rank, 20, kind),), strategy=FORK), folder, [Finder()])

    run = launch(script, tmp_path)

    # As under DDP a run that was asked to stop and has stopped is not an error.
    assert run.returncode == 0, run.output
    assert "Traceback" not in run.output
    assert not explanations(run.output)
    assert len(run.reports()) == 3
    assert {rank["why"] for rank in run.reports()} == {"SIGTERMException"}
    assert len({rank["version"] for rank in run.reports()}) == 1


def test_a_killed_rank_of_a_script_is_named_by_rank_0(tmp_path: Path) -> None:
    run = start_script(Run((Fault(1, 10, "kill"),), ranks=2, strategy=POPEN), tmp_path)

    assert_ended_well(run)
    # Not by a signal: Lightning's own launcher would have killed rank 0 too, and nobody could have said why.
    assert run.returncode == 1
    assert set(explanations(run.output)) == {"rank 1 failed: its process was killed by SIGKILL"}
    assert "[rank1]" not in run.output
    assert run.output.rstrip().endswith("WorkerFailedError: rank 1 failed: its process was killed by SIGKILL")


@pytest.mark.soak
def test_a_stopped_rank_of_a_script_does_not_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "END_TIMEOUT_S", 1.0)
    # It holds the only parameters that may be out, so that rank 0 waits at the barrier and can raise.
    strategy = POPEN | {"worker_timeout": WORKER_TIMEOUT_S, "max_staleness": 0}
    run = start_script(Run((Fault(1, 3, "stop"),), ranks=2, strategy=strategy), tmp_path)

    assert_ended_well(run)
    assert run.returncode == 1
    assert set(explanations(run.output)) == {"rank 1 failed: gave no sign of life for 2 s (worker_timeout)"}


def test_ctrl_c_ends_a_script(tmp_path: Path) -> None:
    fault = Fault(1, 3, "interrupt", "validation_step")
    run = start_interpreters(Run((fault,), ranks=2, strategy=POPEN), tmp_path)

    assert_ended_well(run)
    assert run.returncode == 130
    assert run.output.count("KeyboardInterrupt") == 1
    assert "Traceback" not in run.output


@pytest.mark.soak
def test_an_error_under_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = start_interpreters(Run((Fault(1, 10, "raise"),), ranks=2, strategy=POPEN), tmp_path, *torchrun)

    assert_ended_well(run)
    # torchrun takes the first rank that exits for the culprit.
    assert "local_rank: 1" in run.output
    assert "[rank1]: lightning_async.chaos.fault.InjectedError: injected into training_step" in run.output
    assert set(explanations(run.output)) <= {"rank 1 failed: InjectedError: injected into training_step"}


@pytest.mark.soak
def test_an_error_in_a_spawned_rank(tmp_path: Path) -> None:
    run = start_script(Run((Fault(1, 3, "raise"),), ranks=2, strategy=FORK | {"start_method": "spawn"}), tmp_path)

    assert_ended_well(run)
    assert explanations(run.output) == ["rank 1 failed: InjectedError: injected into training_step"]


@pytest.mark.parametrize("runs", [5, pytest.param(20, marks=pytest.mark.soak)])
def test_runs_in_a_row_raise_no_false_alarm(tmp_path: Path, runs: int) -> None:
    def script(folder: Path) -> None:
        from lightning_async.strategies.process_launcher import ProcessLauncher

        descriptor = os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        warnings.simplefilter("default", ResourceWarning)
        results = ProcessLauncher.get_extra_results

        def results_and_threads(self: ProcessLauncher, trainer: Any) -> dict[str, Any]:
            # In rank 0's process, when its part of the run is over.
            with open(folder / "threads.txt", "a") as file:
                file.writelines(f"{thread.name}\n" for thread in threading.enumerate())
            return results(self, trainer)

        ProcessLauncher.get_extra_results = results_and_threads  # type: ignore[method-assign]
        for _ in range(runs):
            train(Run(strategy=FORK, trainer={"max_epochs": 1}, sleep_s=()), folder)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert (tmp_path / "stderr.txt").read_text() == ""
    left = set((tmp_path / "threads.txt").read_text().split())
    assert not left & {"heartbeats", "listener", "peer", "exit-guard", "session-1", "session-2"}
