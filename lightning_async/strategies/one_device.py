"""What the strategies that simulate a cluster have in common: one process, one device."""

from __future__ import annotations

import os

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

__all__ = ["OneDeviceStrategy", "check_memory", "memory_bytes"]


class OneDeviceStrategy(SingleDeviceStrategy):
    """Trains on the Trainer's device, of which there may be one.

    Args:
        accelerator: see `SingleDeviceStrategy`.
        checkpoint_io: see `SingleDeviceStrategy`.
        precision_plugin: see `SingleDeviceStrategy`.

    Raises:
        MisconfigurationException: if more than one device or node is asked for.
    """

    # What to take for what is simulated.
    real_thing = 'strategy="async" for real ranks'

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__("cpu", accelerator, checkpoint_io, precision_plugin)
        # Lightning sets it, as it sets a distributed strategy's.
        self.num_nodes = 1
        self._devices: list[torch.device] = []

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The Trainer's devices, of which there may be one."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} trains in one process on one device, and the Trainer has {len(devices)}. "
                f"Take devices=1, or {self.real_thing}."
            )
        self._devices = devices
        self._root_device = devices[0]

    @override
    def setup_environment(self) -> None:
        if self.num_nodes > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} trains in one process, and the Trainer has num_nodes={self.num_nodes}. "
                f"Take num_nodes=1, or {self.real_thing}."
            )
        super().setup_environment()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def memory_bytes(device: torch.device) -> int:
    """Memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(subject: str, kept: str, count: int, size: int, device: torch.device, advice: str) -> str:
    """Refuses what does not fit into a device's memory; returns its size in words.

    Args:
        subject: who keeps it.
        kept: what, in the plural.
        count: how many of them.
        size: bytes of each.
        device: where.
        advice: what to take in its place.

    Raises:
        MisconfigurationException: if it does not fit.
    """
    needed, available = count * size, memory_bytes(device)
    sizes = f"{count} {kept} of {size / 1e6:.3g} MB = {needed / 1e6:.3g} MB on {device}"
    if needed > available:
        raise MisconfigurationException(f"{subject} keeps {sizes}, which has {available / 1e6:.3g} MB. Take {advice}.")
    return sizes
