"""Runs a training script in real processes, with a deadline, and checks that nothing is left over.

The script is a function of the test module. It runs in a forked child of the test process (no import to pay for) in a
session of its own, and starts its ranks itself, by a fork strategy or with a real command line.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.cuda import forget_cuda

__all__ = [
    "ENVIRONMENT",
    "Launched",
    "gone",
    "launch",
    "processes_named",
    "report",
    "run_as_command",
    "run_as_script",
    "session_processes",
]

# For interpreters that are started anew.
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}


@dataclass
class Launched:
    """What a launched script left: its exit code, what it printed, and what its ranks reported."""

    returncode: int
    output: str
    folder: Path

    def report(self, rank: int) -> dict[str, Any]:
        """What ``rank`` reported."""
        return dict(torch.load(self.folder / f"rank{rank}.pt", weights_only=False))

    def reports(self) -> list[dict[str, Any]]:
        """What every rank reported, in the order of ranks."""
        return [self.report(rank) for rank in range(len(list(self.folder.glob("rank*.pt"))))]


def report(folder: Path, rank: int, **values: Any) -> None:
    """Called by a rank to hand values to the test."""
    torch.save(values, folder / f"rank{rank}.pt")


def run_as_script(path: Path, *arguments: str) -> None:
    """Runs a file in this process as ``python path arguments`` would; to be called by a launched script.

    Lightning starts the other ranks from there, as interpreters; rank 0 saves the import of everything.
    """
    os.environ |= ENVIRONMENT
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def run_as_command(*arguments: str) -> None:
    """Does in this process what ``python -m lightning_async arguments`` would; to be called by a launched script."""
    os.environ |= ENVIRONMENT
    sys.argv = ["lightning_async", *arguments]
    runpy.run_module("lightning_async", run_name="__main__", alter_sys=True)


def launch(
    script: Callable[[Path], None],
    folder: Path,
    timeout_s: float = 60.0,
    meanwhile: Callable[[int], None] | None = None,
) -> Launched:
    """Runs ``script(folder)`` in a session of its own.

    Args:
        script: what to run.
        folder: working directory, where ranks report.
        timeout_s: the run is killed, and the test fails, after this many seconds.
        meanwhile: called once in the test process, with the session's id, while the script runs.
    """
    log = folder / "output.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    deadline = time.monotonic() + timeout_s
    pid = os.fork()
    if pid == 0:
        _run_child(script, folder, log)
    try:
        if meanwhile is not None:
            meanwhile(pid)
        returncode = _wait(pid, deadline)
        # Ranks that end after their parent are not left over yet: an interpreter takes seconds on a busy machine.
        left = _wait_until_gone(pid, 20.0)
    finally:
        _kill_session(pid)
    output = log.read_text(errors="replace") if log.exists() else ""
    assert returncode is not None, f"still running after {timeout_s} s\n{output}"
    assert not left, f"processes left over: {left}\n{output}"
    return Launched(returncode, output, folder)


def gone(pid: int, timeout_s: float) -> bool:
    """Whether the process ends in time; a zombie has."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def processes_named(session: int, name: str) -> list[int]:
    """The living processes of a session that call themselves so, in the order in which they were started."""
    named = []
    for pid in sorted(session_processes(session)):
        with suppress(OSError):
            named += [pid] * (Path(f"/proc/{pid}/comm").read_text().strip() == name[:15])
    return named


def session_processes(session: int) -> dict[int, str]:
    """The living processes of a session: pid -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(stat[3]) == session and stat[0] != "Z":
            found[int(entry.name)] = command
    return found


def _run_child(script: Callable[[Path], None], folder: Path, log: Path) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.chdir(folder)
        forget_cuda()
        script(folder)
        code = 0
    except SystemExit as error:
        code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _wait_until_gone(session: int, timeout_s: float) -> dict[int, str]:
    deadline = time.monotonic() + timeout_s
    while (left := session_processes(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _kill_session(session: int) -> None:
    for pid in session_processes(session):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # noqa: PERF203  # each process may be gone by itself
            continue
    try:
        os.waitpid(session, 0)
    except ChildProcessError:
        return
