"""The GPU that these tests run on, or what stands in for it where there is none.

With GPU_KIT_STAND_IN=1 ranks compute on the host and take the ways of GPU ranks: staging around host buffers, and Gloo
behind the communicators. That shows that the tests themselves run; what a GPU alone can show, it does not.
"""

from __future__ import annotations

import os
from typing import Any

# Asks the driver's management library instead of CUDA itself, which does not survive a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytest
import torch

from lightning_async.exchange import engine
from lightning_async.exchange import nccl_negotiation as nccl_office
from lightning_async.holder import placement
from lightning_async.strategies import strategy as strategy_module
from lightning_async.strategies.gradient_exchange import GradientExchange
from lightning_async.transport.base import Channel
from lightning_async.transport.devices import RankDevices, place_holder
from lightning_async.transport.nccl import NcclChannel
from lightning_async.transport.staged import StagedChannel
from tests.cuda import count_gpus
from tests.integration.test_gpu_paths import GlooCommunicator, PassingStream

__all__ = ["ACCELERATOR", "FIRST", "GPUS", "SHARES", "STANDS_IN", "busy", "devices", "stand_in"]

STANDS_IN = os.environ.get("GPU_KIT_STAND_IN") == "1"
GPUS = 1 if STANDS_IN else count_gpus()
SHARES = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
ACCELERATOR = "cpu" if STANDS_IN else "cuda"
FIRST = torch.device("cpu") if STANDS_IN else torch.device("cuda", 0)

_CYCLES_PER_MS = 1_500_000


def devices(ranks: int, apart: bool) -> list[torch.device]:
    """One GPU for all ranks, or one for each as far as there are enough: no worker on rank 0's."""
    if STANDS_IN or not apart or GPUS < 2:
        return [FIRST] * ranks
    return [torch.device("cuda", 0 if rank == 0 else 1 + (rank - 1) % (GPUS - 1)) for rank in range(ranks)]


def busy(milliseconds: float) -> None:
    """Keeps the current stream busy for about so long; the host goes on at once."""
    if not STANDS_IN:
        cuda: Any = torch.cuda
        cuda._sleep(int(milliseconds * _CYCLES_PER_MS))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes host ranks, which are forked from this process, take the ways of GPU ranks."""
    held_on_gpu = False

    def devices(self: GradientExchange) -> RankDevices:
        nonlocal held_on_gpu
        facts = [{"uuid": "GPU-0", "nccl": "2.30.3", "shares": SHARES}] * self._context.world_size
        choice = "cpu" if self._context.options.holder == "process" else self._context.options.holder_device
        place = place_holder(choice, self._context.options.transport, facts)
        held_on_gpu = place == "cuda"
        return RankDevices(FIRST, facts[0], place)

    def for_worker(channel: Channel, device: torch.device) -> Channel:
        there = isinstance(channel, NcclChannel) or (held_on_gpu and type(channel).__name__ == "_End")
        return channel if there else StagedChannel(channel, device)

    def for_holder(channel: Channel, device: torch.device) -> Channel:
        there = isinstance(channel, NcclChannel) or not held_on_gpu
        return channel if there else StagedChannel(channel, device)

    monkeypatch.setattr(GradientExchange, "_devices", devices)
    # It looks at the device that ranks compute on.
    monkeypatch.setattr(strategy_module, "refuse_options", lambda *arguments: None)
    monkeypatch.setattr(nccl_office, "nccl_communicator", GlooCommunicator)
    monkeypatch.setattr(placement, "CudaHolderStream", lambda device: PassingStream())
    monkeypatch.setattr(engine, "on_device", for_worker)
    monkeypatch.setattr(placement, "on_device", for_holder)
    made = placement.HolderPlacement
    monkeypatch.setattr(
        engine, "HolderPlacement", lambda *arguments: made(*arguments, stream=PassingStream() if held_on_gpu else None)
    )
