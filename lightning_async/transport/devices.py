"""Which GPU each rank has, which ranks NCCL can join, and where the holder lives: rules without state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

__all__ = ["DeviceFacts", "HolderDevice", "RankDevices", "describe_device", "nccl_obstacle", "place_holder"]

HolderDevice: TypeAlias = Literal["auto", "cpu", "cuda"]
# What a rank says of its GPU, as JSON values; None for a rank that computes on something else.
DeviceFacts = Mapping[str, Any] | None

_SHARING_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"


@dataclass(frozen=True)
class RankDevices:
    """Where this rank computes, and where the holder lives.

    Args:
        own: this rank's device.
        mine: `describe_device` of it.
        holder: from `place_holder`.
    """

    own: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mine: DeviceFacts = None
    holder: Literal["cpu", "cuda"] = "cpu"


def describe_device(device: torch.device) -> DeviceFacts:
    """What other ranks must know of this rank's device, as JSON values; None if it is not a CUDA device.

    Args:
        device: where this rank computes.

    Returns:
        ``uuid`` names the physical GPU, whatever CUDA_VISIBLE_DEVICES calls it; ``nccl`` is the version, empty if
        torch was built without it; ``shares`` is whether NCCL was told to accept several ranks on one GPU.

    Examples:
        >>> describe_device(torch.device("cpu")) is None
        True
    """
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    version = ".".join(map(str, _nccl_version())) if dist.is_nccl_available() else ""
    return {"uuid": str(properties.uuid), "nccl": version, "shares": os.environ.get(_SHARING_VARIABLE) == "1"}


def nccl_obstacle(holder: DeviceFacts, worker: object) -> str | None:
    """Why NCCL cannot join the holder and a worker; None if nothing is known against it.

    Args:
        holder: `describe_device` of rank 0.
        worker: the same of the worker; as it came from there, so of any type.

    Examples:
        >>> gpu = {"uuid": "GPU-1", "nccl": "2.27.3", "shares": False}
        >>> nccl_obstacle(gpu, {**gpu, "uuid": "GPU-2"}) is None
        True
        >>> nccl_obstacle(gpu, gpu)
        "it shares rank 0's GPU"
        >>> nccl_obstacle(gpu, None)
        'it has no CUDA device'
    """
    if holder is None:
        return "rank 0 has no CUDA device"
    if not isinstance(worker, Mapping):
        return "it has no CUDA device"
    if not holder["nccl"] or not worker.get("nccl"):
        return "torch was built without NCCL"
    if holder["nccl"] != worker["nccl"]:
        return f"it has NCCL {worker['nccl']}, rank 0 has {holder['nccl']}"
    if holder["uuid"] == worker.get("uuid") and not (holder["shares"] and worker.get("shares")):
        return "it shares rank 0's GPU"
    return None


def place_holder(choice: HolderDevice, transport: str, facts: Sequence[DeviceFacts]) -> Literal["cpu", "cuda"]:
    """Whether the holder lives on rank 0's GPU or on its host; every rank comes to the same answer.

    Args:
        choice: what was asked for; "auto" is rank 0's GPU if it has one and every other rank is reached by NCCL.
        transport: what was asked for.
        facts: `describe_device` of every rank, in the order of ranks; empty if no rank has a GPU.

    Raises:
        ValueError: if what was asked for cannot be had; the message says what can.

    Examples:
        >>> one, two = ({"uuid": uuid, "nccl": "2.27.3", "shares": False} for uuid in ("GPU-1", "GPU-2"))
        >>> place_holder("auto", "auto", [one, two]), place_holder("auto", "auto", [one, one])
        ('cuda', 'cpu')
    """
    mine, others = (facts[0], facts[1:]) if facts else (None, ())
    if choice == "cuda" and mine is None:
        raise ValueError(
            'holder_device="cuda" was asked for, and rank 0 does not compute on a CUDA device. '
            'Take holder_device="auto", or Trainer(accelerator="cuda")'
        )
    obstacles = [(rank, nccl_obstacle(mine, other)) for rank, other in enumerate(others, start=1)]
    if transport == "nccl":
        if mine is None:
            raise ValueError(
                'transport="nccl" was asked for, and rank 0 does not compute on a CUDA device. '
                'Take transport="auto", or Trainer(accelerator="cuda")'
            )
        for rank, obstacle in obstacles:
            if obstacle is not None:
                raise ValueError(
                    f'transport="nccl" was asked for, and rank {rank} cannot use it: {obstacle}. '
                    'Take transport="auto", which goes through host memory for such ranks'
                )
    if choice != "auto":
        return choice
    by_nccl = transport in ("auto", "nccl") and all(obstacle is None for _, obstacle in obstacles)
    return "cuda" if mine is not None and (by_nccl or not others) else "cpu"


def _nccl_version() -> tuple[int, ...]:
    cuda: Any = torch.cuda
    return tuple(cuda.nccl.version())
