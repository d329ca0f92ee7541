"""The holder's process begins without Lightning and ends with rank 0, whatever becomes of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_async
from lightning_async.exchange.last_state import LastStateFile
from lightning_async.exchange.remote_service import HolderProcess
from tests.launch import ENVIRONMENT, gone

PACKAGE = Path(lightning_async.__file__).parent

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("forks", [False, True], ids=["interpreter", "fork"])
def test_it_ends_when_it_is_told_and_ending_twice_is_ending(forks: bool) -> None:
    process = HolderProcess(forks=forks)
    process.end()
    process.end()
    assert gone(process.pid, 1.0)


RANK_0 = """
import os, sys, time
from lightning_async.exchange.remote_service import HolderProcess
process = HolderProcess(forks=sys.argv[1] == "fork")
process._child.wait_until_ready(300.0)
if os.fork() == 0:
    # A loader's worker, say, which has rank 0's descriptors.
    time.sleep(30)
    os._exit(0)
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["interpreter", "fork"])
def test_it_does_not_outlive_rank_0_whoever_has_inherited_the_connection(how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", RANK_0, how], stdout=subprocess.PIPE, text=True) as rank_0:
        assert rank_0.stdout is not None
        pid = int(rank_0.stdout.readline())
        os.kill(rank_0.pid, signal.SIGKILL)
        assert gone(pid, 5.0)


LEAVING_RANK_0 = """
import os, sys, time
from lightning_async.exchange.remote_service import HolderProcess
from tests.unit.exchange.test_remote_service import Run, amsgrad
run = Run(amsgrad, HolderProcess(forks=True))
run.train(steps=3)
assert run.service.save_on_loss(sys.argv[1], "one")
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print(run.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
def test_it_leaves_what_it_has_whoever_has_inherited_the_connection(tmp_path: Path, is_stopped: bool) -> None:
    file = LastStateFile(tmp_path / "snapshot.ckpt")
    command = [sys.executable, "-c", LEAVING_RANK_0, str(tmp_path / "snapshot.ckpt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT) as rank_0:
        assert rank_0.stdout is not None
        pid = int(rank_0.stdout.readline())
        assert not file.wait(0.0)
        if is_stopped:
            os.kill(pid, signal.SIGSTOP)
        os.kill(rank_0.pid, signal.SIGKILL)
        assert gone(pid, 10.0)

    left = file.read("one")
    assert left is not None and left.version == 3
    # Its threads may outlast it by a moment.
    assert file.wait(5.0)


CORE = ("data", "exchange", "holder", "runtime", "transport")


def test_what_serves_and_what_trains_does_without_lightning() -> None:
    found = {room: [*(PACKAGE / room).glob("[!_]*.py")] for room in CORE}
    assert all(found.values())
    modules = [f"lightning_async.{room}.{path.stem}" for room, paths in found.items() for path in paths]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'lightning', 'pytorch_lightning', 'torchmetrics', 'wandb'} & set(sys.modules), name\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
