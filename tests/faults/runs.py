"""Starts the runs that something goes wrong in, and reads what they say of it.

No test here measures how long an end takes. A run is killed by the harness, and its test fails, when it still runs
after its time-out; what has ended it sooner is in the reason that it gives: ranks that trust in `worker_timeout` alone
would outlast the harness.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from tests.faults.train import Run, as_rank_0_of_a_script, exec_script, train
from tests.launch import Launched, launch

__all__ = [
    "FORK",
    "POPEN",
    "SCRIPT_TIMEOUT_S",
    "WORKER_TIMEOUT_S",
    "assert_ended_well",
    "explanations",
    "start",
    "start_interpreters",
    "start_script",
]

# Each rank of a script imports torch and Lightning, which takes a busy machine its time.
SCRIPT_TIMEOUT_S = 150.0
# For the tests of silence; in the others nothing may need it.
WORKER_TIMEOUT_S = 2.0
FORK: dict[str, Any] = {"start_method": "fork", "worker_timeout": 600.0}
POPEN: dict[str, Any] = {"start_method": "popen", "worker_timeout": 600.0}


def start(run: Run, folder: Path, **arguments: Any) -> Launched:
    """Runs it in forked ranks, in a temporary folder of its own that must be as empty afterwards."""

    def script(folder: Path) -> None:
        tempfile.tempdir = str(folder / "tmp")
        os.mkdir(tempfile.tempdir)
        train(run, folder)

    launched = launch(script, folder, **arguments)
    assert not list((folder / "tmp").glob("pytorch-errorfile*"))
    return launched


def start_script(run: Run, folder: Path) -> Launched:
    """Runs it as a script: rank 0 is a fork of this process, the others are interpreters that Lightning starts."""
    return launch(lambda folder: as_rank_0_of_a_script(run), folder, SCRIPT_TIMEOUT_S)


def start_interpreters(run: Run, folder: Path, *runner: str) -> Launched:
    """Runs it as a script of its own, all of whose ranks are interpreters, started by ``runner`` if one is given."""
    return launch(lambda folder: exec_script(run, *runner), folder, SCRIPT_TIMEOUT_S)


def explanations(output: str) -> list[str]:
    """What was said about the failure: who and why, without where the traceback is."""
    said = re.findall(r"rank \d+ failed: .*", output)
    return [re.sub(r"; its (own )?traceback (is above|says where)$", "", line) for line in said]


def assert_ended_well(run: Launched) -> None:
    """The end left no noise of its own, and at most the culprit's and rank 0's tracebacks."""
    assert run.returncode != 0
    for noise in ("terminate called", "Exception ignored", "core dumped", "Terminating process", "unraisable"):
        assert noise not in run.output
    assert "Exception in thread" not in run.output
