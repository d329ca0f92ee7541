"""`lightning-async chaos`: runs a command, and strikes a random rank of it every so often."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lightning_async.chaos.striker import SIGNALS, Strike, Striker
from lightning_async.runtime.commands import describe_code, passing_signals_on, shell_status, start_or_refuse
from lightning_async.runtime.whereabouts import FOLDER

__all__ = ["chaos_main", "parse_ranks"]

_EPILOGUE = """example:
  lightning-async chaos --every 10 --for 120 -- python train.py

train.py is to train with AsyncAMSGradStrategy(on_worker_failure="continue"):
with another strategy the first strike ends the run. Rank 0 is struck only where
--ranks has it. The exit status is the command's.
"""


def chaos_main(args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        args: arguments after `chaos`; None takes those of the process.

    Returns:
        The exit status: that of the command that was run.
    """
    parser = _parser()
    given = parser.parse_args(args)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("what is to be run? lightning-async chaos --every 10 -- python train.py")
    with tempfile.TemporaryDirectory(prefix="lightning_async-chaos-") as folder:
        started, environment = time.monotonic(), os.environ | {FOLDER: folder}
        with passing_signals_on(lambda: start_or_refuse(parser, command, environment)) as (process, _):
            striker = Striker(
                process.pid, Path(folder), given.every, given.kind, given.ranks, given.seed, given.until, say=_say
            )
            striker.run(lambda seconds: _ends_within(process, seconds))
            code = process.wait()
        striker.end_stopped()
    _say(_summary(striker.strikes, code, time.monotonic() - started))
    return shell_status(code)


def parse_ranks(text: str) -> frozenset[int]:
    """The ranks that a user lists.

    Examples:
        >>> sorted(parse_ranks("1-3,7"))
        [1, 2, 3, 7]
        >>> parse_ranks("3-1")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: '3-1' is no list of ranks such as 1-3 or 0,2
    """
    ranks: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)) or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of ranks such as 1-3 or 0,2")
        ranks.update(range(int(first), int(last or first) + 1))
    return frozenset(ranks)


def _summary(strikes: Sequence[Strike], code: int, seconds: float) -> str:
    by_rank = Counter(strike.rank for strike in strikes)
    details = ", ".join(f"rank {rank}: {count}" for rank, count in sorted(by_rank.items()))
    count = f"{len(strikes)} strike{'' if len(strikes) == 1 else 's'}"
    return f"{count}{f' ({details})' if details else ''}; the command {describe_code(code)} after {seconds:.1f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-async chaos",
        usage="lightning-async chaos [options] -- COMMAND ...",
        description="Run a command, and strike a random rank of it every so often: does the run bear it?",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--every", type=_seconds, default=10.0, metavar="S", help="seconds between two strikes (10)")
    parser.add_argument("--kind", choices=[*SIGNALS], nargs="+", default=["kill"], help="what strikes (kill)")
    parser.add_argument("--ranks", type=parse_ranks, metavar="R", help="which ranks, such as 1-3 (all but rank 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument(
        "--for", dest="until", type=_seconds, metavar="S", help="seconds after which the run is left alone (its end)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _say(line: str) -> None:
    # The command's own output may be read by another program.
    sys.stderr.write(f"[chaos] {line}\n")
    sys.stderr.flush()
