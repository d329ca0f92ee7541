"""Callbacks of the recipes."""

from lightning_async.cli.demo.emulation import EmulatedStepTime

__all__ = ["EmulatedStepTime"]
