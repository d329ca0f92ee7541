"""Runs steps one after another, each with a time-out of its own and all within a budget; the standard library alone.

A step that fails does not stop the others. One that is over its time is interrupted (so that pytest can still say what
it has seen), and killed after a few seconds more. What steps leave running is killed too: the runner's process adopts
orphans, so that ranks in sessions of their own are found. Written down after each step, so nothing is lost if the
whole is stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

__all__ = ["Outcome", "Runner", "Step", "table"]

Status = Literal["ok", "failed", "timed out", "skipped"]

_PR_SET_CHILD_SUBREAPER = 36
# A step that has less than this left to run in would show nothing.
_LEAST_S = 3.0


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: for the table.
        command: what to run.
        timeout_s: seconds that it may take.
        environment: variables on top of the runner's own.
        needs: name of an earlier step without whose success this one makes no sense.
        otherwise: what it means that the step it needs has not succeeded.
    """

    name: str
    command: Sequence[str]
    timeout_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    otherwise: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Args:
        step: its name.
        status: how it ended.
        seconds: how long it took.
        exit_code: of the command; negative for a signal, None if it did not run.
        last_line: the last that it printed, or why it was skipped.
        left_over: how many processes it left running at an end in time.
    """

    step: str
    status: Status
    seconds: float = 0.0
    exit_code: int | None = None
    last_line: str = ""
    left_over: int = 0


class Runner:
    """Runs steps, and keeps their outcomes.

    Args:
        log: the file to which everything that the steps print is appended.
        cwd: where the steps run.
        budget_s: seconds for all steps together.
        grace_s: seconds between a step's interruption and its end by force.
        tell: is given a line for each step that begins, and one for each that ends.
    """

    def __init__(
        self,
        log: Path,
        cwd: Path,
        budget_s: float,
        grace_s: float = 5.0,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._log = log
        self._cwd = cwd
        self._budget_s = budget_s
        self._grace_s = grace_s
        self._tell = tell
        self._started = time.monotonic()
        _adopt_orphans()

    @property
    def seconds(self) -> float:
        """Since the runner was made."""
        return time.monotonic() - self._started

    def run(self, step: Step) -> Outcome:
        """Runs a step, unless the step that it needs has not succeeded, or nothing is left of the budget."""
        left_s = self._budget_s - self.seconds
        succeeded = {outcome.step for outcome in self.outcomes if outcome.status == "ok"}
        if step.needs is not None and step.needs not in succeeded:
            outcome = Outcome(step.name, "skipped", last_line=step.otherwise or f"{step.needs} has not succeeded")
        elif left_s < _LEAST_S:
            outcome = Outcome(step.name, "skipped", last_line=f"the budget of {self._budget_s:.0f} s is used up")
        else:
            self._tell(f"{self.seconds:6.1f} s  {step.name} ...")
            outcome = self._execute(step, min(step.timeout_s, left_s))
        self.outcomes.append(outcome)
        self._tell(f"{self.seconds:6.1f} s  {step.name}: {outcome.status}  {outcome.last_line}")
        return outcome

    def _execute(self, step: Step, timeout_s: float) -> Outcome:
        started = time.monotonic()
        with self._log.open("ab") as log:
            log.write(f"\n=== {step.name}: {' '.join(step.command)}\n".encode())
            log.flush()
            begun_at = log.tell()
            code, in_time, left_over = self._wait_for(step, log, timeout_s)
        seconds = time.monotonic() - started
        status: Status = "timed out" if not in_time else "ok" if code == 0 else "failed"
        return Outcome(step.name, status, seconds, code, _last_line(self._log, begun_at), left_over)

    def _wait_for(self, step: Step, log: IO[bytes], timeout_s: float) -> tuple[int, bool, int]:
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._cwd,
                env={**os.environ, **step.environment},
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{error}\n".encode())
            return 127, True, 0
        in_time = True
        try:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                in_time = False
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self._grace_s)
        finally:
            # Also where the runner itself is told to stop.
            killed = _kill_descendants()
            process.wait()
            _reap()
        return process.returncode, in_time, killed if in_time else 0


def table(outcomes: Sequence[Outcome], width: int = 150) -> str:
    """The outcomes as text: step, status, seconds, exit code, last line."""
    rows = [("step", "status", "seconds", "exit", "last line")]
    for one in outcomes:
        code = "" if one.exit_code is None else str(one.exit_code)
        note = f"[{one.left_over} processes left over] " if one.left_over else ""
        rows.append((one.step, one.status, f"{one.seconds:.1f}", code, note + one.last_line))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3])]
        lines.append("  ".join([*cells, row[4]]).rstrip()[:width])
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """The outcomes as JSON values."""
    return [asdict(outcome) for outcome in outcomes]


def _last_line(log: Path, begun_at: int) -> str:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(begun_at, file.tell() - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _adopt_orphans() -> None:
    """Lets processes whose parent has ended become this process's children, instead of the system's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot adopt orphans")


def _descendants(of: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found = list(children.get(of, []))
    for pid in found:
        found += children.get(pid, [])
    yield from found


def _kill_descendants(timeout_s: float = 5.0) -> int:
    """Kills every process that descends from this one; returns how many there were."""
    seen: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        alive = list(_descendants(os.getpid()))
        if not alive:
            break
        for pid in alive:
            seen.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return len(seen)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
