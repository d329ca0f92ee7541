"""`lightning-async plan`: what asynchronous training would do with given step times, before anything is trained."""

from __future__ import annotations

from lightning_async.cli.plan.command import plan_main

__all__ = ["plan_main"]
