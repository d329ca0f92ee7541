"""With the holder in a process of its own nothing hangs either, and that process is never left over."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injector import Fault, pid_of
from tests.faults.runs import (
    FORK,
    POPEN,
    WORKER_TIMEOUT_S,
    assert_ended_well,
    explanations,
    start,
    start_script,
)
from tests.faults.train import Run
from tests.launch import processes_named

pytestmark = pytest.mark.timeout(180)

APART = FORK | {"holder": "process"}


def holder_process_of(session: int) -> int:
    """The process id of the one process of a run that holds."""
    (found,) = processes_named(session, "remote_main")
    return found


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(Fault(0, 20, "raise"), "InjectedError: injected into training_step", marks=pytest.mark.soak),
        pytest.param(Fault(2, 20, "raise"), "InjectedError: injected into training_step", marks=pytest.mark.soak),
        pytest.param(
            Fault(2, 3, "raise", "validation_step", after_s=0.3),
            "InjectedError: injected into validation_step",
            marks=pytest.mark.soak,
        ),
        (Fault(0, 0, "raise", "configure_optimizers"), "InjectedError: injected into configure_optimizers"),
        (Fault(2, 20, "kill"), "its process was killed by SIGKILL"),
        pytest.param(Fault(2, 0, "kill", "on_fit_start"), "its process was killed by SIGKILL", marks=pytest.mark.soak),
    ],
    ids=lambda value: f"{value.kind}-{value.place}-rank{value.rank}" if isinstance(value, Fault) else "",
)
def test_a_failing_rank_is_named_and_ends_everyone(tmp_path: Path, fault: Fault, reason: str) -> None:
    run = start(Run((fault,), strategy=APART), tmp_path)

    assert_ended_well(run)
    assert explanations(run.output) == [f"rank {fault.rank} failed: {reason}"]


def test_when_rank_0_is_killed_everybody_ends(tmp_path: Path) -> None:
    run = start(Run((Fault(0, 20, "kill"),), strategy=APART), tmp_path)

    assert_ended_well(run)
    assert explanations(run.output)[-1] == "rank 0 failed: its process was killed by SIGKILL"


def test_ranks_parked_at_the_barrier_are_woken(tmp_path: Path) -> None:
    run = start(Run((Fault(2, 5, "kill", after_s=0.4),), strategy=APART | {"max_staleness": 0}), tmp_path)

    assert_ended_well(run)
    assert explanations(run.output) == ["rank 2 failed: its process was killed by SIGKILL"]


@pytest.mark.parametrize("transport", ["auto", pytest.param("tcp", marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "its holder process was killed by SIGKILL"),
        pytest.param(
            signal.SIGSTOP,
            "its holder process gave no sign of life for 2 s (worker_timeout)",
            marks=pytest.mark.soak,
        ),
    ],
    ids=["killed", "stopped"],
)
def test_the_end_of_the_holders_process_is_rank_0s_failure(
    tmp_path: Path, number: signal.Signals, reason: str, transport: str
) -> None:
    def strike(session: int) -> None:
        pid_of(tmp_path, 2)
        time.sleep(0.2)
        os.kill(holder_process_of(session), number)

    strategy = APART | {"transport": transport, "worker_timeout": WORKER_TIMEOUT_S}
    run = start(Run(strategy=strategy), tmp_path, meanwhile=strike)

    assert_ended_well(run)
    assert set(explanations(run.output)) == {f"rank 0 failed: {reason}"}


@pytest.mark.parametrize("place", ["training_step", "validation_step"])
def test_ctrl_c_ends_every_rank_with_one_line(tmp_path: Path, place: str) -> None:
    run = start(Run((Fault(2, 3, "interrupt", place),), strategy=APART), tmp_path)

    assert_ended_well(run)
    assert run.returncode == 130
    assert run.output.count("interrupted") == 1
    assert "Traceback" not in run.output


@pytest.mark.soak
def test_ctrl_c_ends_a_script(tmp_path: Path) -> None:
    strategy: dict[str, Any] = POPEN | {"holder": "process"}
    run = start_script(Run((Fault(1, 3, "interrupt", "validation_step"),), ranks=2, strategy=strategy), tmp_path)

    assert_ended_well(run)
    assert run.returncode == 130
    assert run.output.count("KeyboardInterrupt") == 1
    assert "Traceback" not in run.output


def test_after_sigterm_to_every_process_the_run_ends_in_order(tmp_path: Path) -> None:
    run = start(Run((Fault(2, 20, "sigterm_all"),), strategy=APART), tmp_path)

    assert run.returncode == 0, run.output
    assert not explanations(run.output)
    assert "Traceback" not in run.output


@pytest.mark.soak
def test_an_error_of_rank_0s_own_is_not_buried(tmp_path: Path) -> None:
    strategy: dict[str, Any] = POPEN | {"holder": "process"}
    run = start_script(Run((Fault(0, 10, "raise"),), ranks=2, strategy=strategy), tmp_path)

    assert_ended_well(run)
    assert run.output.rstrip().endswith("InjectedError: injected into training_step")
    assert run.output.count("Traceback") == 1


@pytest.mark.soak
def test_a_script_trains_and_a_killed_rank_of_it_is_named(tmp_path: Path) -> None:
    strategy: dict[str, Any] = POPEN | {"holder": "process"}
    run = start_script(Run((Fault(1, 10, "kill"),), ranks=2, strategy=strategy), tmp_path)

    assert_ended_well(run)
    assert run.returncode == 1
    assert set(explanations(run.output)) == {"rank 1 failed: its process was killed by SIGKILL"}
