"""Ranks of another host are lost and started again there: every sample counts once, and both hosts come to their end."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from lightning_async.runtime.listening import reserved
from tests.faults.injector import Fault
from tests.faults.test_runs_that_go_on import check, train
from tests.launch import Launched, launch

pytestmark = pytest.mark.timeout(120)

HOSTS, ON_EACH = 2, 2


def start(folder: Path, *faults: Fault, **arguments: Any) -> Launched:
    """Runs it on two hosts; the status of host 1 and what it prints are in ``host1.status`` and ``host1.txt``."""

    def script(folder: Path) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if (other := os.fork()) == 0:
            os.environ["NODE_RANK"] = "1"
            descriptor = os.open(folder / "host1.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os._exit(status_of(folder))
        os.environ["NODE_RANK"] = "0"
        code = status_of(folder)
        (folder / "host1.status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])))
        sys.exit(code)

    def status_of(folder: Path) -> int:
        try:
            train(folder, faults, ON_EACH, hosts=HOSTS, **arguments)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stderr.flush()
        return 0

    with reserved(0) as port:
        return launch(script, folder, timeout_s=60.0)


def host_1(run: Launched) -> tuple[int, str]:
    return int((run.folder / "host1.status").read_text()), (run.folder / "host1.txt").read_text()


@pytest.mark.parametrize("rank", [2, 3])
def test_a_lost_rank_of_another_host_comes_back_and_trains(tmp_path: Path, rank: int) -> None:
    run = start(tmp_path, Fault(rank, 3, "kill"), max_restarts=3)
    status, said = host_1(run)
    print(run.output, said)
    first = check(run, lost=[rank], joined=(rank,))
