"""Ranks that were started on two hosts, each by a process of its own: both name the rank that has failed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injector import Fault
from tests.faults.runs import FORK, SCRIPT_TIMEOUT_S, explanations
from tests.faults.train import Run, train
from tests.two_hosts import launch_on_two_hosts, said_on_host_1

pytestmark = pytest.mark.timeout(170)

HOSTS = 2


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
    wanted = Run((fault,), ranks=2, strategy=FORK, trainer=trainer)
    run = launch_on_two_hosts(partial(train, wanted), tmp_path)

    other = said_on_host_1(tmp_path)
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
    wanted = Run((Fault(0, 5, "kill"),), ranks=2, strategy=FORK, trainer=trainer)
    run = launch_on_two_hosts(partial(train, wanted), tmp_path)

    other = said_on_host_1(tmp_path)
    assert explanations(run.output)[-1] == "rank 0 failed: its process was killed by SIGKILL"
    assert {line[:14] for line in explanations(other)} == {"rank 0 failed:"}


@pytest.mark.soak
def test_spawned_ranks_of_two_hosts_train_together(tmp_path: Path) -> None:
    spawn = {"start_method": "spawn", "worker_timeout": 600.0}
    wanted = Run((), ranks=2, strategy=spawn, trainer={"max_epochs": 2, "num_nodes": HOSTS})
    run = launch_on_two_hosts(partial(train, wanted), tmp_path, timeout_s=SCRIPT_TIMEOUT_S)

    other = said_on_host_1(tmp_path)
    assert run.returncode == 0, run.output + other
    # The command that started each host hears of the end, and rank 0 alone has the run's table.
    assert "Traceback" not in run.output + other
    assert "updates in" in run.output
    assert "updates in" not in other


@pytest.mark.soak
def test_a_spawned_rank_that_is_killed_is_named_on_both_hosts(tmp_path: Path) -> None:
    spawn = {"start_method": "spawn", "worker_timeout": 600.0}
    trainer = {"max_epochs": 200, "num_nodes": HOSTS}
    wanted = Run((Fault(3, 5, "kill"),), ranks=2, strategy=spawn, trainer=trainer)
    run = launch_on_two_hosts(partial(train, wanted), tmp_path, timeout_s=SCRIPT_TIMEOUT_S)

    assert run.returncode == 1, run.output
    for output in (run.output, said_on_host_1(tmp_path)):
        assert explanations(output), output
        assert all(line.startswith("rank 3 failed: its process ") for line in explanations(output)), output
