"""Ranks that were started on two hosts, each by a process of its own: both name the rank that has failed."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from lightning_async.runtime.listening import reserved
from tests.faults.injector import Fault
from tests.faults.runs import FORK, SCRIPT_TIMEOUT_S, explanations
from tests.faults.train import Run, train
from tests.launch import Launched, launch

pytestmark = pytest.mark.timeout(170)

HOSTS = 2


def start_on_two_hosts(run: Run, folder: Path, timeout_s: float = 60.0) -> Launched:
    """Runs it as two hosts would that know each other's address; what host 1 prints is in ``host1.txt``."""

    def script(folder: Path) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        other = os.fork()
        os.environ["NODE_RANK"] = "1" if other == 0 else "0"
        if other == 0:
            descriptor = os.open(folder / "host1.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        code = 1
        try:
            train(run, folder)
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        if other == 0:
            os._exit(code)
        os.waitpid(other, 0)
        sys.exit(code)

    with reserved(0) as port:
        return launch(script, folder, timeout_s)


@pytest.mark.parametrize(
    ("kind", "reason", "rank"),
    [
        ("raise", "InjectedError: injected into training_step", 1),
        ("kill", "its process ", 3),
        *(
            pytest.param(kind, reason, rank, marks=pytest.mark.soak)
            for kind, reason, rank in (
                ("raise", "InjectedError: injected into training_step", 2),
                ("raise", "InjectedError: injected into training_step", 3),
                ("kill", "its process ", 1),
                ("kill", "its process ", 2),
            )
        ),
    ],
)
def test_a_rank_of_either_host_is_named_on_both(tmp_path: Path, kind: Any, reason: str, rank: int) -> None:
    fault = Fault(rank, 5, kind)
    trainer = {"max_epochs": 200, "num_nodes": HOSTS}
    run = start_on_two_hosts(Run((fault,), ranks=2, strategy=FORK, trainer=trainer), tmp_path)

    other = (tmp_path / "host1.txt").read_text()
    assert run.returncode == 1, run.output
    for output in (run.output, other):
        assert explanations(output), output
        assert all(line.startswith(f"rank {rank} failed: {reason}") for line in explanations(output)), output
        assert "IndexError" not in output
    # The traceback is where the rank ran.
    if kind == "raise":
        assert "in strike" in (run.output if rank < 2 else other)


def test_rank_0s_host_is_named_on_the_other(tmp_path: Path) -> None:
    trainer = {"max_epochs": 200, "num_nodes": HOSTS}
    run = start_on_two_hosts(Run((Fault(0, 5, "kill"),), ranks=2, strategy=FORK, trainer=trainer), tmp_path)

    other = (tmp_path / "host1.txt").read_text()
    assert explanations(run.output)[-1] == "rank 0 failed: its process was killed by SIGKILL"
    assert {line[:14] for line in explanations(other)} == {"rank 0 failed:"}


@pytest.mark.soak
def test_spawned_ranks_of_two_hosts_train_together(tmp_path: Path) -> None:
    spawn = {"start_method": "spawn", "worker_timeout": 600.0}
    run = start_on_two_hosts(
        Run((), ranks=2, strategy=spawn, trainer={"max_epochs": 2, "num_nodes": HOSTS}), tmp_path, SCRIPT_TIMEOUT_S
    )

    other = (tmp_path / "host1.txt").read_text()
    assert run.returncode == 0, run.output + other
    # The command that started each host hears of the end, and rank 0 alone has the run's table.
    assert "Traceback" not in run.output + other
    assert "updates in" in run.output
    assert "updates in" not in other


@pytest.mark.soak
def test_a_spawned_rank_that_is_killed_is_named_on_both_hosts(tmp_path: Path) -> None:
    spawn = {"start_method": "spawn", "worker_timeout": 600.0}
    trainer = {"max_epochs": 200, "num_nodes": HOSTS}
    run = start_on_two_hosts(
        Run((Fault(3, 5, "kill"),), ranks=2, strategy=spawn, trainer=trainer), tmp_path, SCRIPT_TIMEOUT_S
    )

    assert run.returncode == 1, run.output
    for output in (run.output, (tmp_path / "host1.txt").read_text()):
        assert explanations(output), output
        assert all(line.startswith("rank 3 failed: its process ") for line in explanations(output)), output
