"""`lightning-async demo`: one small training with two strategies, side by side, and what it is made of.

It needs nothing but the package. The recipes are made of the same parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async.on_demand import names_on_demand

if TYPE_CHECKING:
    from lightning_async.cli.demo.command import demo_main

__all__ = ["demo_main"]

# On demand: the trainings import the parts, and no command line.
__getattr__ = names_on_demand(__name__, {"demo_main": "lightning_async.cli.demo.command"})
