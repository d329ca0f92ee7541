"""What the command line says when something is wrong: one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async.runtime.failure import WorkerFailedError, tell
from lightning_async.runtime.interrupts import leave_interrupted, rank_of_environment

__all__ = ["is_debugging", "one_line", "told_in_one_line"]

_DEBUG = "JSONARGPARSE_DEBUG"

# Lines of jsonargparse's messages that say how it went about parsing, and nothing about the argument.
_BOILERPLATE = re.compile(
    r"Does not validate against any of the Union subtypes$|Subtypes: |Errors:$"
    r"|Given value type: |Given value: (NestedArg|Namespace|\[<)"
    r"|Expected a <class 'NoneType'>$|Expected a path but .* not accessible or invalid$|Not a valid subclass of "
    r"|Subclass types expect one of:$|a class path \(str\)$|a dict with |a dict without "
)


def one_line(message: str) -> str:
    """Shorten a message of several lines to what the reader can act on, in one line.

    Args:
        message: what a parser or an exception says.

    Returns:
        The message without boilerplate, its lines joined by semicolons, or by nothing after a colon.

    Examples:
        >>> one_line('''Parser key "trainer.max_epochs":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'int'>, <class 'NoneType'>]
        ...   Errors:
        ...     - Expected a <class 'int'>
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'str'>
        ...   Given value: abc''')
        'Parser key "trainer.max_epochs": Expected int; Given value: abc'
    """
    told: list[str] = []
    for line in message.replace('in "<unicode string>", ', "at ").splitlines():
        text = re.sub(r"^[-\s]+", "", line).strip()
        if text and not _BOILERPLATE.match(text) and text not in told:
            told.append(text)
    if any(not text.startswith(("Parser key", "Expected", "Given value")) for text in told):
        # What is wrong with the value says more than which other types would do.
        told = [text for text in told if not re.fullmatch(r"Expected a <class '\w+'>", text)] or told
    joined = "".join(text + (" " if text.endswith(":") else "; ") for text in told).rstrip("; ")
    joined = re.sub(r"\ba typing\.Literal\[([^\]]*)\]", r"one of \1", joined)
    return re.sub(r"\ba? ?<class '([^']+)'>", r"\1", joined) or message.strip() or "no reason was given"


def is_debugging() -> bool:
    """Whether the environment asks for tracebacks, with jsonargparse's variable ``JSONARGPARSE_DEBUG``."""
    return os.environ.get(_DEBUG, "").lower() not in ("", "0", "false", "no")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn errors that the user can mend without a traceback into one line on stderr and an exit status.

    A configuration that cannot run and a missing file end with status 2, another rank's failure with 1 (its own
    traceback is in its own output), Ctrl+C with 130. All other exceptions pass.

    Raises:
        SystemExit: with the status.
    """
    if _DEBUG in os.environ:
        # jsonargparse raises at any other spelling.
        os.environ[_DEBUG] = "true" if is_debugging() else "false"
    try:
        yield
    except (MisconfigurationException, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if is_debugging():
            raise
        _leave(str(error), 2)
    except WorkerFailedError as error:
        if is_debugging():
            raise
        traceback, line = tell(error)
        if error.failure.reason.startswith(f"{MisconfigurationException.__name__}: "):
            _leave(line.partition("; its ")[0], 2)
        sys.stderr.write(f"{traceback}\n\n" if traceback else "")
        _leave(line, 1)
    except KeyboardInterrupt:
        leave_interrupted()


def _leave(message: str, status: int) -> None:
    rank = rank_of_environment()
    sys.stderr.write(f"error{'' if rank == '0' else f' (rank {rank})'}: {one_line(message)}\n")
    # Without the chain of exceptions: an exit status is all that is left to say.
    raise SystemExit(status) from None
