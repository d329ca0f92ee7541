"""Under which names Lightning knows the strategies, and how each starts its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["START_METHODS", "STRATEGIES", "register"]

# The plain names of the strategies, and their classes.
STRATEGIES = {"async_amsgrad": "AsyncAMSGradStrategy", "async": "AsyncStrategy"}

# What stands behind a strategy's plain name, and how its ranks are started then.
START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register(kind: str, name: str, make: Callable[..., Any], registry: Any) -> None:
    """Registers a strategy as ``name``, ``name_spawn``, ``name_fork`` and ``name_notebook``.

    Args:
        kind: the name of the strategy's class, for descriptions.
        name: the plain name.
        make: makes the strategy; takes ``start_method``.
        registry: Lightning's registry of strategies.
    """
    for suffix, start_method in START_METHODS.items():
        registry.register(
            name + suffix,
            make,
            description=f"{kind}: asynchronous with bounded staleness, ranks started by {start_method}",
            override=True,
            start_method=start_method,
        )
