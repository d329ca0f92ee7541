"""Ranks of another host are lost and started again there: every sample counts once, and both hosts come to an end."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_async.strategies import script_launcher
from tests.faults.injector import Fault, pid_of
from tests.faults.runs import SCRIPT_TIMEOUT_S, explanations
from tests.faults.test_runs_that_go_on import BATCHES, VALIDATED, train
from tests.launch import Launched, run_as_script
from tests.two_hosts import launch_on_two_hosts, said_on_host_1, status_of_host_1

pytestmark = pytest.mark.timeout(120)

HOSTS, ON_EACH = 2, 2
# Of each rank before it is lost; what is more comes from the one in its place.
BEFORE = 3
MOST_EPOCHS = 4000
# Interpreters that import twice, on a busy machine.
SOAK_TIMEOUT_S = 300.0


class Ending(Callback):
    """Ends the run an epoch after what it is for; no test waits for the time that something takes.

    Args:
        lost: how many losses that is.
        trained: the rank that has come back then, and trained.
    """

    def __init__(self, lost: int, trained: int | None) -> None:
        self.lost, self.trained = lost, trained
        self.is_seen = False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        stats = trainer.strategy.stats
        trainer.should_stop |= self.is_seen
        back = self.trained is None or (self.trained in stats.joined and stats.updates_by_rank[self.trained] > BEFORE)
        self.is_seen = trainer.is_global_zero and len(stats.evicted) >= self.lost and back


def train_until(folder: Path, faults: Sequence[Fault], lost: int, trained: int | None, **arguments: Any) -> None:
    callbacks = [Ending(lost, trained)]
    train(folder, tuple(faults), ON_EACH, epochs=MOST_EPOCHS, hosts=HOSTS, callbacks=callbacks, **arguments)


def start(
    folder: Path,
    *faults: Fault,
    lost: int,
    trained: int | None = None,
    meanwhile: Callable[[Path], None] | None = None,
    timeout_s: float = 60.0,
    **arguments: Any,
) -> Launched:
    """Runs it on two hosts until as many ranks were lost, and one has come back and trained."""

    def script(folder: Path) -> None:
        if arguments.get("start_method") == "popen":
            plan = {"faults": [asdict(fault) for fault in faults], "lost": lost, "trained": trained}
            run_as_script(Path(__file__), json.dumps(plan | arguments))
            for process in script_launcher._started:
                # An interpreter takes its time to shut down.
                process.wait(SCRIPT_TIMEOUT_S)
        else:
            train_until(folder, faults, lost, trained, **arguments)

    act = None if meanwhile is None else (lambda session: meanwhile(folder))
    return launch_on_two_hosts(script, folder, timeout_s=timeout_s, meanwhile=act)


def host_1(run: Launched) -> tuple[int, str]:
    return status_of_host_1(run.folder), said_on_host_1(run.folder)


def check_training(run: Launched, lost: list[int], joined: list[int]) -> dict[str, Any]:
    """Every epoch was trained once, and all ranks that are left ended with the same; rank 0's report."""
    assert run.returncode == 0, run.output + host_1(run)[1]
    first = run.report(0)
    assert (sorted(first["evicted"]), sorted(first["joined"])) == (lost, joined), run.output
    assert 1 < len(first["tickets"]) < MOST_EPOCHS
    assert first["tickets"] == [Counter(range(BATCHES))] * len(first["tickets"])
    for other in (run.report(rank) for rank in range(1, 4) if (run.folder / f"rank{rank}.pt").exists()):
        assert torch.equal(other["parameters"], first["parameters"])
        assert (other["steps"], other["epochs"][-1]) == (first["steps"], first["epochs"][-1])
    return first


def check(run: Launched, lost: list[int], joined: list[int]) -> dict[str, Any]:
    """The same, and every epoch was validated once."""
    first = check_training(run, lost, joined)
    assert set(first["counts"]) == {VALIDATED}
    return first


def test_ranks_of_another_host_come_back_and_train_until_they_die_too_often(tmp_path: Path) -> None:
    """The host's first rank like any other."""
    faults = [Fault(2, BEFORE, "kill"), *(Fault(3, BEFORE, "kill", incarnation=times) for times in (0, 1))]

    run = start(tmp_path, *faults, lost=3, trained=2, max_restarts=1)

    status, said = host_1(run)
    first = check(run, lost=[2, 3, 3], joined=[2, 3])
    assert status == 0, said
    # What the one that has come back computes is applied.
    assert first["updates_by_rank"][2] > BEFORE
    for rank in (2, 3):
        # Whichever is first: its connection ends, or its launcher tells of the end.
        assert re.search(rf"rank {rank} is lost: its process (is gone|was killed by SIGKILL)", run.output), run.output
        assert f"[host 1] lightning_async: rank {rank} is lost: its process was killed by SIGKILL; " in said
    assert run.output.count("it is started again by host 1 (1 of 1)") == said.count("it is started again (1 of 1)") == 2
    for output in (run.output, said):
        assert output.count("it is not started again (max_restarts=1)") == 1


def test_a_host_that_loses_all_its_ranks_ends_and_the_other_goes_on(tmp_path: Path) -> None:
    faults = [Fault(rank, BEFORE, "kill") for rank in (2, 3)]

    run = start(tmp_path, *faults, lost=2, max_restarts=0)

    status, said = host_1(run)
    assert check(run, lost=[2, 3], joined=[])["world_sizes"][-1] == 2
    assert status == 1
    assert "the run goes on without this host, whose ranks are all lost" in said


def test_ranks_whose_launcher_is_killed_leave_the_run_which_goes_on(tmp_path: Path) -> None:
    def strike(folder: Path) -> None:
        pid_of(folder, 3)
        os.kill(int((folder / "host1.pid").read_text()), signal.SIGKILL)

    run = start(tmp_path, lost=2, meanwhile=strike, max_restarts=3)

    status, _said = host_1(run)
    assert check(run, lost=[2, 3], joined=[])["world_sizes"][-1] == 2
    assert status == -signal.SIGKILL
    assert "leaves: it was told to end (SIGTERM)" in run.output


@pytest.mark.soak
@pytest.mark.timeout(330)
def test_the_first_spawned_rank_of_another_host_comes_back_too(tmp_path: Path) -> None:
    run = start(
        tmp_path,
        Fault(2, BEFORE, "kill"),
        lost=1,
        trained=2,
        start_method="spawn",
        timeout_s=SOAK_TIMEOUT_S,
        max_restarts=3,
    )

    status, said = host_1(run)
    check_training(run, lost=[2], joined=[2])
    assert status == 0, said


@pytest.mark.soak
@pytest.mark.timeout(330)
def test_a_script_starts_the_ranks_of_its_host_again(tmp_path: Path) -> None:
    run = start(
        tmp_path,
        *(Fault(3, BEFORE, "kill", incarnation=times) for times in (0, 1)),
        lost=2,
        start_method="popen",
        timeout_s=SOAK_TIMEOUT_S,
        max_restarts=1,
    )

    status, said = host_1(run)
    check(run, lost=[3, 3], joined=[3])
    assert status == 0, said
    assert "it is started again by host 1 (1 of 1)" in run.output
    killed = "[rank 2] lightning_async: rank 3 is lost: its process was killed by SIGKILL; it is"
    assert f"{killed} started again (1 of 1)" in said and f"{killed} not started again (max_restarts=1)" in said


@pytest.mark.soak
@pytest.mark.timeout(330)
def test_the_ranks_of_a_script_outlive_its_first_and_are_lost_for_good_then(tmp_path: Path) -> None:
    def strike(folder: Path) -> None:
        other = pid_of(folder, 3, SOAK_TIMEOUT_S)
        # Longer than a launcher that fails gives its ranks to end.
        time.sleep(12.0)
        os.kill(other, signal.SIGKILL)

    run = start(
        tmp_path,
        Fault(2, BEFORE, "kill"),
        lost=2,
        meanwhile=strike,
        start_method="popen",
        timeout_s=SOAK_TIMEOUT_S,
        max_restarts=1,
    )

    status, said = host_1(run)
    check(run, lost=[2, 3], joined=[])
    assert status == -signal.SIGKILL, said
    assert "it is not started again: what has started it is gone" in run.output


@pytest.mark.soak
@pytest.mark.timeout(330)
def test_the_first_rank_of_a_script_that_is_told_to_end_passes_it_on(tmp_path: Path) -> None:
    run = start(
        tmp_path,
        Fault(2, BEFORE, "sigterm"),
        lost=2,
        start_method="popen",
        timeout_s=SOAK_TIMEOUT_S,
        max_restarts=1,
    )

    status, said = host_1(run)
    check(run, lost=[2, 3], joined=[])
    assert status == 0, said
    assert run.output.count("leaves: it was told to end (SIGTERM)") == 2


@pytest.mark.soak
@pytest.mark.parametrize("rank", [2, 3])
def test_one_that_is_stopped_is_ended_and_started_again_where_it_was(tmp_path: Path, rank: int) -> None:
    run = start(tmp_path, Fault(rank, BEFORE, "stop"), lost=1, trained=rank, max_restarts=1, worker_timeout=2.0)

    status, said = host_1(run)
    check(run, lost=[rank], joined=[rank])
    assert status == 0, said
    assert f"rank {rank} is lost: gave no sign of life for 2 s (worker_timeout); it is started again (1 of 1)" in said


@pytest.mark.soak
@pytest.mark.parametrize("rank", [2, 3])
def test_one_that_is_told_to_end_leaves_alone_and_is_not_started_again(tmp_path: Path, rank: int) -> None:
    run = start(tmp_path, Fault(rank, BEFORE, "sigterm"), lost=1, max_restarts=2)

    status, said = host_1(run)
    check(run, lost=[rank], joined=[])
    assert status == 0, said
    assert "started again" not in run.output + said


@pytest.mark.soak
@pytest.mark.parametrize("rank", [2, 3])
def test_one_that_is_out_of_memory_is_started_again(tmp_path: Path, rank: int) -> None:
    run = start(tmp_path, Fault(rank, BEFORE, "exhaust"), lost=1, trained=rank, max_restarts=1)

    status, said = host_1(run)
    check(run, lost=[rank], joined=[rank])
    assert status == 0, said


@pytest.mark.soak
@pytest.mark.parametrize(("rank", "kind"), [(0, "kill"), (2, "raise"), (3, "raise"), (1, "raise")])
def test_what_ends_the_run_ends_both_hosts_and_nothing_is_started_again(tmp_path: Path, rank: int, kind: Any) -> None:
    run = start(tmp_path, Fault(rank, 6, kind), lost=1, max_restarts=3)

    status, said = host_1(run)
    assert (run.returncode, status) == (1, 1)
    for output in (run.output, said):
        assert explanations(output) and all(line.startswith(f"rank {rank} failed") for line in explanations(output))
        assert "started again" not in output


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    train_until(Path.cwd(), [Fault(**fault) for fault in plan.pop("faults")], **plan)
