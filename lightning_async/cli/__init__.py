"""The command line `lightning-async`: LightningCLI with the asynchronous strategies, `compare` and `report`.

The outermost room: it imports the package, and nothing imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_async.cli.app import main

__all__ = ["main"]


def __getattr__(name: str) -> Any:
    # Looked up when it is used: what imports `cli.compare.recorder` alone is no command line.
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_async.cli.app import main

    return main
