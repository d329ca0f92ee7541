"""Two hosts that are two processes of this one, as Lightning's variables have it: each starts its own ranks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_async.runtime.listening import reserved
from tests.launch import Launched, launch

__all__ = ["launch_on_two_hosts", "said_on_host_1", "status_of_host_1"]


def launch_on_two_hosts(script: Callable[[Path], object], folder: Path, **options: Any) -> Launched:
    """Calls ``script`` on both, as ``launch`` does on one.

    What host 1 prints is in ``host1.txt``, its process id in ``host1.pid``, and how it has ended in ``host1.status``.

    Args:
        script: what each host runs; its error or its ``SystemExit`` is the status of the host.
        folder: where it runs.
        options: as of `launch`.
    """

    def both(folder: Path) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if (other := os.fork()) == 0:
            os.environ["NODE_RANK"] = "1"
            descriptor = os.open(folder / "host1.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os._exit(_status_of(script, folder))
        os.environ["NODE_RANK"] = "0"
        (folder / "host1.pid").write_text(str(other))
        code = _status_of(script, folder)
        (folder / "host1.status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])))
        sys.exit(code)

    with reserved(0) as port:
        return launch(both, folder, **options)


def said_on_host_1(folder: Path) -> str:
    return (folder / "host1.txt").read_text()


def status_of_host_1(folder: Path) -> int:
    return int((folder / "host1.status").read_text())


def _status_of(script: Callable[[Path], object], folder: Path) -> int:
    try:
        script(folder)
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0
