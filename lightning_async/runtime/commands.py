"""A command that was started for a user: signals that go on to it, and how its end is told."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["describe_code", "passing_signals_on", "shell_status"]


@contextmanager
def passing_signals_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """SIGTERM goes to the command; Ctrl+C has reached it, and what becomes of it is its own.

    Args:
        process: of the command.

    Yields:
        The signals that have come so far.
    """
    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        if number == signal.SIGTERM:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
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
