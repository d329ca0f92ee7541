"""The holder's process begins without Lightning and ends with rank 0, whatever becomes of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lightning_async.exchange.remote_service import HolderProcess
from tests.launch import gone

pytestmark = pytest.mark.timeout(120)


def test_it_ends_when_it_is_told_and_ending_twice_is_ending() -> None:
    process = HolderProcess()
    process.end()
    process.end()
    assert gone(process.pid, 1.0)


RANK_0 = """
import os, sys, time
from lightning_async.exchange.remote_service import HolderProcess
process = HolderProcess()
process._ready.wait()
if os.fork() == 0:
    # A loader's worker, say, which has rank 0's descriptors.
    time.sleep(30)
    os._exit(0)
print(process.pid, flush=True)
time.sleep(60)
"""


def test_it_does_not_outlive_rank_0_whoever_has_inherited_the_connection() -> None:
    with subprocess.Popen([sys.executable, "-c", RANK_0], stdout=subprocess.PIPE, text=True) as rank_0:
        assert rank_0.stdout is not None
        pid = int(rank_0.stdout.readline())
        os.kill(rank_0.pid, signal.SIGKILL)
        assert gone(pid, 5.0)


_CORE = (
    "engine",
    "holder_main",
    "holder_process",
    "membership",
    "reactor",
    "streams",
    "tickets",
    "transport.gloo",
    "transport.nccl",
    "transport.shm",
    "transport.staged",
    "worker",
)


@pytest.mark.parametrize("module", _CORE)
def test_what_serves_and_what_trains_does_without_lightning(module: str) -> None:
    code = (
        f"import sys, lightning_async.{module}\n"
        "assert not {'lightning', 'pytorch_lightning', 'torchmetrics', 'wandb'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
