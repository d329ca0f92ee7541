"""Whether code has come in between: by a signal's handler, or in the middle of what this package does."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from types import CodeType, FrameType

__all__ = ["comes_between"]

# While one of them is at work, locks may be held and parameters be half updated.
_INDIVISIBLE = tuple(f"lightning_async.{room}." for room in ("exchange", "holder", "data", "transport"))


def comes_between(frame: FrameType | None) -> bool:
    """Whether what runs was called by a signal's handler, or from the middle of an exchange.

    Python runs a handler in the main thread between any two of its instructions, so what is in the middle of something
    there cannot go on before the handler returns. A handler is known by its code, which is among that of the handlers
    that are installed.

    Args:
        frame: of the code in question.
    """
    handlers = _handlers() if threading.current_thread() is threading.main_thread() else set()
    while frame is not None:
        if frame.f_code in handlers or str(frame.f_globals.get("__name__", "")).startswith(_INDIVISIBLE):
            return True
        frame = frame.f_back
    return False


def _handlers() -> set[CodeType]:
    return {code for signum in signal.valid_signals() for code in _codes(signal.getsignal(signum))}


def _codes(handler: object) -> Iterator[CodeType]:
    """The code that a handler is, or that calls it."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    called = [vars(kind)["__call__"] for kind in type(handler).__mro__ if "__call__" in vars(kind)]
    for owner in (handler, *called):
        # Of a decorated function each layer.
        while owner is not None:
            code = getattr(owner, "__code__", None)
            if isinstance(code, CodeType):
                yield code
            owner = getattr(owner, "__wrapped__", None)
