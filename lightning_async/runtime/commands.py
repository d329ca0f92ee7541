"""A command that was started for a user: signals that go on to it, and how its end is told."""

from __future__ import annotations

import argparse
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

__all__ = ["describe_code", "passing_signals_on", "shell_status", "start_or_refuse"]


def start_or_refuse(
    parser: argparse.ArgumentParser, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a command; one that cannot be run is told as wrong arguments are.

    Args:
        parser: of the arguments.
        command: the command.
        environment: its variables.
    """
    try:
        return subprocess.Popen(command, env=environment)
    except OSError as error:
        parser.error(f"{command[0]} cannot be run: {error.strerror}")


@contextmanager
def passing_signals_on(
    start: Callable[[], subprocess.Popen[bytes]],
) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """SIGTERM goes to the command, as do SIGUSR1 and SIGUSR2, by which schedulers ask for a checkpoint.

    Ctrl+C has reached it already, and what becomes of that is its own.

    Args:
        start: starts the command. A signal that comes meanwhile would otherwise end this process and leave the command.

    Yields:
        The command's process, and the signals to end that have come so far.
    """
    came: list[int] = []
    # While the command is being started.
    early: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            came.append(number)
        if number == signal.SIGINT:
            return
        if process is None:
            early.append(number)
            return
        with suppress(ProcessLookupError):
            process.send_signal(number)

    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        process = start()
        while early:
            pass_on(early.pop(0), None)
        yield process, came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shell_status(code: int) -> int:
    """What a shell tells of a process that has ended so.

    Examples:
        >>> shell_status(1), shell_status(-9)
        (1, 137)
    """
    return code if code >= 0 else 128 - code


def describe_code(code: int) -> str:
    """How a process has ended, in words.

    Examples:
        >>> describe_code(1), describe_code(-9)
        ('exited with code 1', 'was ended by SIGKILL')
    """
    return f"exited with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
