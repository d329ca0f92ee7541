"""Ranks that srun has started: on a real cluster of two hosts, where SLURM is installed, and by its variables alone."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.harness import eventually
from tests.hosts.machines import Machines
from tests.hosts.slurm import Slurm, slurm_cluster
from tests.hosts.train import SAMPLES, main, seen_by_ranks, trained_samples
from tests.launch import launch

EACH_ONCE = Counter(range(SAMPLES))
TRAIN = ("python", "-m", "tests.hosts.train")
UPDATES_PER_EPOCH = SAMPLES // 4
# Four interpreters import everything on what may be two busy cores.
START_S = 180.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Slurm, Machines]]:
    with slurm_cluster(tmp_path) as cluster:
        yield cluster


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_srun_starts_the_ranks_of_two_hosts(cluster: tuple[Slurm, Machines], tmp_path: Path) -> None:
    slurm, _ = cluster

    status, printed = slurm.srun("--nodes=2", "--ntasks-per-node=2", *TRAIN, timeout_s=START_S)

    assert status == 0, printed
    assert [(one["host"], one["local_rank"]) for one in seen_by_ranks(tmp_path)] == [
        ("node1", 0), ("node1", 1), ("node2", 0), ("node2", 1)
    ]  # fmt: skip
    assert trained_samples(tmp_path) == EACH_ONCE


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_hosts_of_a_heterogeneous_job_have_unlike_numbers_of_ranks(
    cluster: tuple[Slurm, Machines], tmp_path: Path
) -> None:
    slurm, _ = cluster

    components = ("--nodes=1", "--ntasks-per-node=1", *TRAIN, ":", "--nodes=1", "--ntasks-per-node=2", *TRAIN)
    status, printed = slurm.srun(*components, timeout_s=START_S)

    assert status == 0, printed
    assert [(one["host"], one["world_size"]) for one in seen_by_ranks(tmp_path)] == [
        ("node1", 3), ("node2", 3), ("node2", 3)
    ]  # fmt: skip
    assert trained_samples(tmp_path) == EACH_ONCE


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_killed_task_ends_the_job_and_is_named(cluster: tuple[Slurm, Machines]) -> None:
    slurm, _ = cluster
    fault = json.dumps([{"rank": 3, "step": 5, "kind": "kill"}])

    train = (*TRAIN, "--epochs=500", "--faults", fault)
    status, printed = slurm.srun("--nodes=2", "--ntasks-per-node=2", *train, timeout_s=START_S)

    assert status != 0
    assert "rank 3 failed: its process is gone" in printed, printed
    assert re.search(r"srun: error: node2: task 3: Killed", printed)
    assert set(re.findall(r"rank (\d) failed", printed)) == {"3"}


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_others_go_on_without_a_killed_task_where_srun_lets_them(
    cluster: tuple[Slurm, Machines], tmp_path: Path
) -> None:
    slurm, _ = cluster
    fault = json.dumps([{"rank": 3, "step": 5, "kind": "kill"}])
    options = ("--nodes=2", "--ntasks-per-node=2", "--no-kill", "--kill-on-bad-exit=0", "--wait=0")

    train = (*TRAIN, "--epochs=20", "--faults", fault, "--strategy", '{"on_worker_failure": "continue"}')
    _, printed = slurm.srun(*options, *train, timeout_s=START_S)

    assert "3 ranks go on without it" in printed, printed
    assert [one["rank"] for one in seen_by_ranks(tmp_path)] == [0, 1, 2]
    assert len(seen_by_ranks(tmp_path)[0]["applied"]) == 20 * UPDATES_PER_EPOCH


def has_updates(snapshot: Path) -> bool:
    """Whether a snapshot was written after an update."""
    return bool(torch.load(snapshot, weights_only=False)["async_amsgrad"]["version"])


@pytest.mark.soak
@pytest.mark.timeout(500)
@pytest.mark.parametrize("how", ["signal", "requeue"])
def test_a_requeued_job_goes_on_where_it_was(cluster: tuple[Slurm, Machines], tmp_path: Path, how: str) -> None:
    """By SLURM's signal before the time limit, which Lightning answers; by an administrator, from a snapshot."""
    slurm, _ = cluster
    epochs, log = 40, tmp_path / "job.txt"
    strategy = json.dumps({"snapshot_every_s": 0.5} if how == "requeue" else {})
    train = f"{' '.join(TRAIN)} --epochs={epochs} --sleep-s=0.05 --strategy '{strategy}'"
    job = slurm.submit(f"srun {train}\n", "--nodes=2", "--ntasks-per-node=2", "--requeue")
    assert eventually(lambda: log.exists() and log.read_text().count("trains") == 4, START_S), log.read_text()
    if how == "requeue":
        assert eventually(lambda: any(map(has_updates, tmp_path.rglob("snapshot.ckpt"))), 30.0)

    slurm.command(*(("scancel", "--signal=USR1", job) if how == "signal" else ("scontrol", "requeue", job)))

    assert eventually(lambda: slurm.job(job)["JobState"] in ("COMPLETED", "FAILED"), START_S), log.read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert slurm.job(job)["Restarts"] == "1"
    again = seen_by_ranks(tmp_path)
    assert {one["began"] for one in again} == {again[0]["began"]}
    assert 0 < again[0]["began"] < again[0]["ended"] == epochs * UPDATES_PER_EPOCH
    assert len(again[0]["applied"]) == again[0]["ended"] - again[0]["began"]


# As srun of SLURM 22.05 sets them for two hosts.
EVEN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_NODELIST": "node[1-2]"}
UNEVEN = EVEN | {"SLURM_NTASKS": "3", "SLURM_HET_SIZE": "2"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("job", "tasks"), [(EVEN, [2, 2]), (UNEVEN, [1, 2])], ids=["alike", "heterogeneous"])
def test_sruns_variables_make_the_ranks_of_two_hosts(tmp_path: Path, job: dict[str, str], tasks: list[int]) -> None:
    places = [(node, local) for node, count in enumerate(tasks) for local in range(count)]

    def script(folder: Path) -> None:
        # Both hosts are this one, whatever their names.
        os.environ |= job | {"SLURM_JOB_ID": "1007", "SLURM_JOB_NAME": "train", "MASTER_ADDR": "127.0.0.1"}
        children = []
        for rank, (node, local) in enumerate(places):
            if (child := os.fork()) == 0:
                os.environ |= {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
                main(f"--folder={folder}")
                return
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert [one["local_rank"] for one in seen_by_ranks(tmp_path)] == [local for _, local in places]
    assert {one["world_size"] for one in seen_by_ranks(tmp_path)} == {len(places)}
    assert trained_samples(tmp_path) == EACH_ONCE
