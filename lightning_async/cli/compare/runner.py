"""Runs jobs in processes of their own, leaves out what is done, and survives what fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from typing_extensions import Self

__all__ = ["LOG_NAME", "Job", "Outcome", "Watcher", "is_finished", "only_one_at_a_time", "run_jobs"]

_POLL_S = 0.1
_STATUS_FILE = "run.json"
LOG_NAME = "output.log"
_TIMED_OUT = 124


@dataclass(frozen=True)
class Job:
    """One process to run.

    Args:
        name: what messages call it.
        command: program and arguments. The process writes `record` with `"finished": true` in it.
        folder: where its files go; it is emptied before the process starts.
        digest: tells whether a result that lies there is of the same job.
        record: the file with what it measured.
        environment: variables to set for it.
    """

    name: str
    command: Sequence[str]
    folder: Path
    digest: str
    record: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        job: which.
        failure: why it has no result; `None` if it has one.
        seconds: how long it took, the start of its process included; 0 if it was finished before.
        status: its process's exit status, negative if a signal ended it; 124 if it took too long.
    """

    job: Job
    failure: str | None = None
    seconds: float = 0.0
    status: int = 0


class Watcher(Protocol):
    """Is told how it goes."""

    def started(self, job: Job) -> None:
        """The job's process has been started."""

    def progressed(self, job: Job, record: Mapping[str, Any]) -> None:
        """The job's process has written its record anew."""

    def waiting(self) -> None:
        """Nothing new; called several times a second."""

    def ended(self, outcome: Outcome) -> None:
        """The job has ended, or was finished before."""


def is_finished(job: Job) -> bool:
    """Whether a result of the very same job lies in its folder: same digest, exit status 0, a finished record."""
    status, record = _read_json(job.folder / _STATUS_FILE), _read_json(job.record)
    return status.get("digest") == job.digest and status.get("status") == 0 and record.get("finished") is True


def run_jobs(jobs: Sequence[Job], watcher: Watcher, parallel: int, timeout_s: float) -> list[Outcome]:
    """Run what is not finished; a failing job stops no other.

    Args:
        jobs: what to run, in this order.
        watcher: is told how it goes.
        parallel: how many at a time.
        timeout_s: a job that takes longer is killed and counts as failed, in seconds.

    Returns:
        How each job ended, in the order of `jobs`.

    Raises:
        KeyboardInterrupt: on Ctrl+C or SIGTERM, after the running processes have been killed.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = []
    for job in jobs:
        if is_finished(job):
            outcomes[job.name] = Outcome(job)
            watcher.ended(outcomes[job.name])
        else:
            waiting.append(job)
    running: list[_Running] = []
    with _Interruptions() as interruptions:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    running.append(_Running(waiting.pop(0)))
                    watcher.started(running[-1].job)
                    interruptions.check()
                time.sleep(_POLL_S)
                interruptions.check()
                watcher.waiting()
                for run in list(running):
                    if (record := run.news()) is not None:
                        watcher.progressed(run.job, record)
                    outcome = run.outcome(timeout_s)
                    if outcome is not None:
                        running.remove(run)
                        outcomes[run.job.name] = outcome
                        watcher.ended(outcome)
            interruptions.check()
        finally:
            for run in running:
                run.kill()
    return [outcomes[job.name] for job in jobs]


@contextlib.contextmanager
def only_one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two comparisons from writing into one folder.

    Args:
        folder: where they would write; made if it is missing.

    Raises:
        ValueError: if another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            # Gone with this process, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another comparison is writing into {folder}") from error
        yield


class _Running:
    """A job's process, in a session of its own, so that it takes all its ranks with it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.folder.exists():
            shutil.rmtree(job.folder)
        job.folder.mkdir(parents=True)
        self._start_s = time.monotonic()
        self._seen_ns = 0
        with (job.folder / LOG_NAME).open("w") as log:
            self._process = subprocess.Popen(
                list(job.command),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def news(self) -> dict[str, Any] | None:
        """The record, if it has been written since the last call."""
        try:
            written_ns = self.job.record.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if written_ns == self._seen_ns:
            return None
        self._seen_ns = written_ns
        return _read_json(self.job.record)

    def outcome(self, timeout_s: float) -> Outcome | None:
        """How the job has ended, or `None` while it runs."""
        seconds = time.monotonic() - self._start_s
        status = self._process.poll()
        if status is None and seconds < timeout_s:
            return None
        self.kill()
        failure = f"it did not end within {timeout_s:g} s" if status is None else self._failure(status)
        content = {
            "digest": self.job.digest,
            "command": list(self.job.command),
            "status": status if failure is None or status else 1,
            "failure": failure,
            "seconds": seconds,
        }
        (self.job.folder / _STATUS_FILE).write_text(json.dumps(content, indent=2) + "\n")
        return Outcome(self.job, failure, seconds, _TIMED_OUT if status is None else status)

    def kill(self) -> None:
        """End what is left of the process and of what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _failure(self, status: int) -> str | None:
        log = self.job.folder / LOG_NAME
        if status == 0:
            if _read_json(self.job.record).get("finished") is True:
                return None
            return f"it ended before its training did; see {log}"
        how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        said = _what_it_said(log.read_text(errors="replace"))
        return f"{how}{f': {said}' if said else ''}; see {log}"


def _what_it_said(log: str) -> str:
    """The line that says why: the error of the command line or of a traceback; else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        name = line.split(":", 1)[0].split(" (rank", 1)[0]
        if ":" in line and " " not in name and name.endswith(("Error", "Exception", "error")):
            return line
    return lines[-1] if lines else ""


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is none, or half of one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class _Interruptions:
    """Notes Ctrl+C and SIGTERM while it is entered, until they are asked for; in the main thread.

    The jobs are in sessions of their own, and would live on. Raised at once, an interruption could come when a process
    is started already and nobody knows of it yet.
    """

    def __init__(self) -> None:
        self._noted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # A shell's background job ignores SIGINT.
                if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if one was noted."""
        if self._noted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
