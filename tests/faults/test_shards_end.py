"""With the holder in shards nothing hangs either, and no process of a shard is left over."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.injector import Fault, pid_of
from tests.faults.runs import FORK, WORKER_TIMEOUT_S, assert_ended_well, explanations, start
from tests.faults.test_runs_that_go_on import check
from tests.faults.test_runs_that_go_on import start as start_to_go_on
from tests.faults.train import Run
from tests.launch import processes_named

pytestmark = pytest.mark.timeout(180)

SHARDS = FORK | {"holder_shards": 2}


def shard_process_of(session: int) -> int:
    """The process id of the one shard of a run that is not rank 0's."""
    (found,) = processes_named(session, "follower_main")
    return found


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "its process for shard 1 of the holder was killed by SIGKILL"),
        pytest.param(
            signal.SIGSTOP,
            "its process for shard 1 of the holder gave no sign of life for 2 s (worker_timeout)",
            marks=pytest.mark.soak,
        ),
    ],
    ids=["killed", "stopped"],
)
def test_the_end_of_a_shard_is_rank_0s_failure(tmp_path: Path, number: signal.Signals, reason: str) -> None:
    def strike(session: int) -> None:
        pid_of(tmp_path, 2)
        time.sleep(0.2)
        os.kill(shard_process_of(session), number)

    run = start(Run(strategy=SHARDS | {"worker_timeout": WORKER_TIMEOUT_S}), tmp_path, meanwhile=strike)

    assert_ended_well(run)
    assert set(explanations(run.output)) == {f"rank 0 failed: {reason}"}


@pytest.mark.soak
def test_a_killed_rank_is_named_and_ends_everyone(tmp_path: Path) -> None:
    run = start(Run((Fault(2, 20, "kill"),), strategy=SHARDS), tmp_path)

    assert_ended_well(run)
    assert explanations(run.output) == ["rank 2 failed: its process was killed by SIGKILL"]


@pytest.mark.soak
def test_a_run_goes_on_without_a_killed_rank_and_every_sample_counts_once(tmp_path: Path) -> None:
    run = start_to_go_on(tmp_path, Fault(2, 5, "kill"), holder_shards=3)

    check(run, lost=[2])


@pytest.mark.soak
def test_with_overlap_every_sample_counts_once(tmp_path: Path) -> None:
    check(start_to_go_on(tmp_path, holder_shards=2, overlap=True), lost=[])
