"""Under which names Lightning knows the strategies, and how each starts its ranks. Below `strategy.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies import _StrategyRegistry

__all__ = ["register"]


def register(kind: Callable[..., Any], name: str, registry: _StrategyRegistry) -> None:
    """Registers a strategy as ``name``, ``name_spawn``, ``name_fork`` and ``name_notebook``.

    Args:
        kind: the strategy's class, which takes ``start_method``.
        name: the plain name.
        registry: Lightning's registry.
    """
    for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
        registry.register(
            name + suffix,
            kind,
            description=f"{kind.__name__}: asynchronous with bounded staleness, ranks started by {start_method}",
            start_method=start_method,
        )
