"""Changes to Lightning's objects that are undone together."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

__all__ = ["become_until_closed", "set_until_closed"]


def set_until_closed(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute of an object or a class, and has ``undo`` set it back.

    Examples:
        >>> class Bar:
        ...     rate = 1
        >>> bar = Bar()
        >>> with ExitStack() as undo:
        ...     set_until_closed(undo, bar, "rate", 5)
        ...     bar.rate
        5
        >>> bar.rate, vars(bar)
        (1, {})
    """
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(_remove, owner, name)
    setattr(owner, name, value)


def become_until_closed(undo: ExitStack, instance: Any, kind: type) -> None:
    """Gives an object another class, and has ``undo`` change it back; its state, and what refers to it, stay."""
    undo.callback(setattr, instance, "__class__", type(instance))
    instance.__class__ = kind


def _remove(owner: Any, name: str) -> None:
    # User code may have removed it.
    if name in vars(owner):
        delattr(owner, name)
