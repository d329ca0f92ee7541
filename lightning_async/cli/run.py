"""`lightning-async run`: runs a command, and starts it again when it was killed or has failed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from lightning_async.chaos.processes import descendants, parents
from lightning_async.runtime.commands import describe_code, passing_signals_on, shell_status, start_or_refuse
from lightning_async.runtime.interrupts import INTERRUPTED
from lightning_async.runtime.job import RESTARTS_VARIABLE, RUN_VARIABLE
from lightning_async.runtime.prctl import adopt_orphans
from lightning_async.runtime.restart_counts import back_off_s
from lightning_async.strategies.launching import END_TIMEOUT_S

__all__ = ["run_main"]

_EPILOGUE = """example:
  lightning-async run --max-restarts 3 -- python train.py

train.py is to train with a strategy of this package that has snapshot_every_s=60 or so:
it goes on from the newest snapshot by itself. A command that is interrupted, is stopped
by SIGTERM or has wrong arguments (status 2) is not started again. Other ranks than rank 0
need no restart: on_worker_failure="continue" goes on without them.
"""
_WRONG_ARGUMENTS = 2
_LOOK_S = 0.05
# For the state of a large model, on a slow disk.
_WRITING_S = 60.0


def run_main(args: Sequence[str] | None = None) -> int:
    """Runs the command, as often as it takes.

    Args:
        args: arguments after `run`; None takes those of the process.

    Returns:
        The exit status: that of the command when it was run last.
    """
    parser = _parser()
    given = parser.parse_args(args)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("what is to be run? lightning-async run -- python train.py")
    adopt_orphans()
    variables = os.environ | {RUN_VARIABLE: os.environ.get(RUN_VARIABLE) or uuid.uuid4().hex}
    # A scheduler that has started this command again counts, too.
    before = int(os.environ.get(RESTARTS_VARIABLE) or 0)
    count = 0
    while True:
        started = time.monotonic()
        environment = variables | {RESTARTS_VARIABLE: str(before + count)}
        with passing_signals_on(partial(start_or_refuse, parser, command, environment)) as (process, came):
            code = process.wait()
            status = shell_status(code)
            ended = f"the command {describe_code(code)} after {time.monotonic() - started:.0f} s"
            if code == 0 or came or status in (_WRONG_ARGUMENTS, INTERRUPTED):
                return status
            if count == given.max_restarts:
                _say(f"{ended}, and was started again {count} times (--max-restarts): it is not started any more")
                return status
            count += 1
            delay_s = back_off_s(count)
            when = f" in {delay_s:g} s" if delay_s else ""
            _say(f"{ended}; it is started again{when} ({count} of {given.max_restarts})")
            # Ranks that rank 0 has left behind have the GPUs.
            _end_orphans(END_TIMEOUT_S, came)
            deadline = time.monotonic() + delay_s
            while time.monotonic() < deadline and not came:
                time.sleep(min(_LOOK_S, delay_s))
            if came:
                # As the first process of a container this one would not even be ended by it.
                return shell_status(-came[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-async run",
        usage="lightning-async run [--max-restarts N] -- COMMAND ...",
        description="Run a command, and start it again when it was killed or has failed: the run survives rank 0.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--max-restarts", type=_count, default=3, metavar="N", help="how often it is started again (3)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive whole number")
    return int(text)


def _end_orphans(timeout_s: float, came: Sequence[int]) -> None:
    """Gives what the command has left behind ``timeout_s`` to end by itself, then kills it, and waits as long again.

    Args:
        timeout_s: the time; longer while a holder's process among them writes what it has had.
        came: signals that tell this process to end, which then waits for nobody.
    """
    started = time.monotonic()
    while (left := descendants(os.getpid(), parents())) and not came:
        waited_s = time.monotonic() - started
        patience_s = max(timeout_s, _WRITING_S) if any(map(_writes, left)) else timeout_s
        if waited_s > 2 * patience_s:
            pids = ", ".join(map(str, sorted(left)))
            _say(f"what the command has left does not end, although it was killed: process {pids}. It stays")
            break
        if waited_s > patience_s:
            for pid in left:
                # It may have ended just now, or be another user's.
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)
    # They have no other parent that would ask for their status.
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _writes(pid: int) -> bool:
    """Whether a process is a holder's, which leaves what it has had for the next start."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "remote_main"
    except OSError:
        return False


def _say(line: str) -> None:
    # The command's own output may be read by another program.
    sys.stderr.write(f"[run] {line}\n")
    sys.stderr.flush()
