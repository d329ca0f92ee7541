"""What starts the ranks of several hosts: each command of docs/cluster.md and recipes/cluster, as it stands there.

The commands run on two hosts whose names are those of the page, with the variables that an engine would set.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import eventually
from tests.hosts.machines import Machines, two_machines
from tests.hosts.train import SAMPLES, seen_by_ranks, trained_samples

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
KUBERNETES: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "cluster" / "kubernetes.yaml").read_text())
SKYPILOT: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "cluster" / "skypilot.yaml").read_text())
SLURM = (ROOT / "recipes" / "cluster" / "slurm.sh").read_text()
NODES = ("node1", "node2")
EACH_ONCE = Counter(range(SAMPLES))
# Four interpreters import everything on what may be two busy cores.
START_S = 200.0
# A pod's name, and what the headless service of a TrainJob makes of the first one's.
PODS = (("lightning-async-node-0-0.lightning-async",), ("lightning-async-node-0-1.lightning-async",))


def blocks(heading: str) -> dict[str, str]:
    """The commands of a section, by the titles of their blocks."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert section, f"docs/cluster.md has no section {heading!r}"
    return dict(re.findall(r'```bash title="([^"]+)"\n(.*?)```', section, re.DOTALL))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with two_machines(tmp_path, more_names=PODS) as machines:
        put_script(tmp_path)
        yield machines


def put_script(folder: Path) -> None:
    """The user's ``train.py``, whose options come by the variable ``TRAIN``: the page's commands have none."""
    main = 'main(*os.environ.get("TRAIN", "").split())'
    text = f'import os\n\nfrom tests.hosts.train import main\n\nif __name__ == "__main__":\n    {main}\n'
    (folder / "train.py").write_text(text)


def run_on_both(machines: Machines, commands: Sequence[str], variables: Sequence[Mapping[str, str]] = ({}, {})) -> None:
    """Runs a shell's command on each host; both must end well."""
    running = [
        machines.start(node, "sh", "-ec", command, output=f"{node}.txt", **more)
        for node, command, more in zip(NODES, commands, variables, strict=True)
    ]
    try:
        codes = [process.wait(START_S) for process in running]
    except subprocess.TimeoutExpired:
        codes = [1]
    assert codes == [0, 0], "\n".join((machines.folder / f"{node}.txt").read_text() for node in NODES)


def assert_trained(folder: Path) -> None:
    """Two ranks on each host have trained on each sample once."""
    assert [one["host"] for one in seen_by_ranks(folder)] == ["node1", "node1", "node2", "node2"]
    assert trained_samples(folder) == EACH_ONCE


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("heading", ["Two machines under a desk", "torchrun"])
def test_the_commands_of_the_page_train_on_two_hosts(machines: Machines, tmp_path: Path, heading: str) -> None:
    commands = blocks(heading)

    run_on_both(machines, [commands[f"on {node}"] for node in NODES])

    assert_trained(tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_machine_joins_by_the_pages_commands(machines: Machines, tmp_path: Path) -> None:
    commands = blocks("A machine that comes later")
    strategy = '{"on_worker_failure":"continue","join_file":"join.json"}'
    options = f"--nodes=1 --epochs=100000 --sleep-s=0.05 --strategy={strategy}"
    first = machines.start("node1", "sh", "-ec", commands["on node1"], output="node1.txt", TRAIN=options)
    log = tmp_path / "node1.txt"
    assert eventually(lambda: (tmp_path / "join.json").exists() and "rank 1 trains" in log.read_text(), START_S)

    machines.start("node2", "sh", "-ec", commands["on node2"], output="node2.txt", TRAIN=options)

    assert eventually(lambda: "rank 2 has joined; 3 ranks train" in log.read_text(), START_S), log.read_text()
    assert first.poll() is None


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_trainjobs_command_trains_by_kubeflows_variables(machines: Machines, tmp_path: Path) -> None:
    trainer = KUBERNETES["spec"]["trainer"]
    given = {one["name"]: one["value"] for one in trainer["env"]}
    given |= {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": PODS[0][0],
        "PET_MASTER_PORT": "29400",
    }

    run_on_both(machines, [" ".join(trainer["command"])] * 2, [given | {"PET_NODE_RANK": str(rank)} for rank in (0, 1)])

    assert_trained(tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_skypilot_task_trains_by_its_variables(machines: Machines, tmp_path: Path) -> None:
    given = {name: str(value) for name, value in SKYPILOT["envs"].items()}
    given |= {
        "SKYPILOT_NUM_NODES": str(SKYPILOT["num_nodes"]),
        "SKYPILOT_NODE_IPS": "10.77.0.1\n10.77.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "0",
    }

    run_on_both(machines, [SKYPILOT["run"]] * 2, [given | {"SKYPILOT_NODE_RANK": str(rank)} for rank in (0, 1)])

    assert_trained(tmp_path)


def test_the_recipes_name_what_their_engines_take() -> None:
    trainer = KUBERNETES["spec"]["trainer"]

    assert (KUBERNETES["apiVersion"], KUBERNETES["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert trainer["numNodes"] == trainer["numProcPerNode"] == SKYPILOT["num_nodes"] == 2
    assert all(isinstance(one["value"], str) for one in trainer["env"])
    assert set(SKYPILOT) <= {"name", "num_nodes", "resources", "envs", "workdir", "setup", "run"}
    assert set(re.findall(r"SKYPILOT_\w+", SKYPILOT["run"])) == {
        "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_GPUS_PER_NODE"
    }  # fmt: skip


@pytest.mark.parametrize("script", [SKYPILOT["run"], SLURM, *blocks("torchrun").values()])
def test_the_shell_takes_what_the_page_and_the_recipes_say(script: str) -> None:
    assert subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize("file", ["kubernetes.yaml", "skypilot.yaml", "slurm.sh"])
def test_the_page_names_each_recipe(file: str) -> None:
    assert f"recipes/cluster/{file}" in PAGE
