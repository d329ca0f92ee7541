"""Under torchrun the report of each host names the rank that failed."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from lightning_async.runtime import elastic
from lightning_async.runtime.elastic import forget_failure, record_failure
from lightning_async.runtime.failure import RunFailure
from lightning_async.runtime.listening import reserved
from tests.faults.injector import Fault
from tests.faults.runs import POPEN, SCRIPT_TIMEOUT_S
from tests.faults.train import Run, exec_script
from tests.launch import launch

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setattr(elastic, "_written", set())
    return path


def root_cause(output: str) -> str:
    """The part of torchrun's report about the rank that it takes for the cause."""
    return output.rpartition("Root Cause (first observed failure):")[2].partition("=====")[0]


def test_the_rank_at_fault_leaves_its_error_and_another_rank_whose_it_was(error_file: Path) -> None:
    failure = RunFailure(3, "ValueError: no")
    try:
        raise ValueError("no")
    except ValueError as error:
        record_failure(3, failure, error)
    mine = json.loads(error_file.read_text())["message"]
    forget_failure()
    left = error_file.exists()
    record_failure(1, failure, RuntimeError("Connection closed by peer"))
    others = json.loads(error_file.read_text())["message"]

    assert mine["message"] == "ValueError: no"
    assert 'raise ValueError("no")' in mine["extraInfo"]["py_callstack"]
    assert mine["extraInfo"]["timestamp"].isdigit()
    assert not left
    assert others["message"] == "rank 3 failed: ValueError: no"
    assert others["extraInfo"]["py_callstack"].startswith("rank 3 failed: ValueError: no\nThis is rank 1")


def test_what_was_left_first_stays(error_file: Path) -> None:
    record_failure(1, RunFailure(1, "ValueError: no"), ValueError("no"))
    record_failure(1, RunFailure(2, "a consequence"))

    assert json.loads(error_file.read_text())["message"]["message"] == "ValueError: no"


def test_without_torchrun_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)

    record_failure(1, RunFailure(1, "ValueError: no"))

    assert not elastic.is_supervised()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_on_each_host_the_root_cause_names_the_rank_that_failed(tmp_path: Path) -> None:
    """Two hosts with two ranks each; rank 2, which is the first of host 1, fails."""
    run = Run((Fault(2, 10, "raise"),), ranks=2, strategy=POPEN, trainer={"max_epochs": 200, "num_nodes": 2})

    def script(folder: Path) -> None:
        host = os.fork()
        node = int(host == 0)
        descriptor = os.open(folder / f"host{node}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        where = (f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}")
        torchrun = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", *where)
        if node == 1:
            exec_script(run, *torchrun)
        child = os.fork()
        if child == 0:
            exec_script(run, *torchrun)
        codes = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in (child, host)]
        sys.exit(int(codes == [1, 1]))

    with reserved(0) as port:
        launched = launch(script, tmp_path, SCRIPT_TIMEOUT_S)

    hosts = [(tmp_path / f"host{node}.txt").read_text() for node in range(2)]
    assert launched.returncode == 1, hosts
    here, there = map(root_cause, hosts)
    # On rank 0's host it is rank 0 that speaks; on the other, the rank at fault, with its traceback.
    assert re.search(r"rank +: 0 \(local_rank: 0\)", here), hosts[0]
    assert "rank 2 failed: InjectedError: injected into training_step" in here
    assert re.search(r"rank +: 2 \(local_rank: 0\)", there), hosts[1]
    assert "InjectedError: injected into training_step" in there
    assert "in strike" in there
