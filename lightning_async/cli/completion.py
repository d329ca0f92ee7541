"""Completion by the shell: what jsonargparse cannot know of the arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Union

from lightning.pytorch.strategies import Strategy, StrategyRegistry

__all__ = ["offer_strategy_names", "strategy_names"]

_ARGUMENT = "trainer.strategy"


def strategy_names() -> list[str]:
    """The names that a Trainer takes for a strategy, this package's first."""
    names: list[str] = StrategyRegistry.available_strategies()
    return [*sorted((name for name in names if name != "auto"), key=lambda name: not name.startswith("async")), "auto"]


def offer_strategy_names(parsers: Iterable[Any]) -> None:
    """Have completion offer strategies by name too, where the argument is any text or a class.

    Args:
        parsers: of the commands. They can print a completion script afterwards, and nothing else.
    """
    names = tuple(strategy_names())
    for parser in parsers:
        for action in parser._actions:
            if action.dest == _ARGUMENT:
                action._typehint = Union[Literal[names], Strategy]  # noqa: UP007  # as jsonargparse reads it
