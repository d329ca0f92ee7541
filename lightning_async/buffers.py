"""Tensors that every rank must share in the synchronous phase: broadcast and averaged over the default group."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average_buffers", "broadcast_tensors"]


def broadcast_tensors(tensors: Iterable[Tensor], device: torch.device | None = None) -> None:
    """Overwrites the tensors with rank 0's, in place; a collective call.

    Args:
        tensors: what to share.
        device: where the default group can send them from, if they may lie elsewhere.
    """
    with torch.no_grad():
        for tensor in tensors:
            shared = _reachable(tensor.detach().to(device or tensor.device).contiguous())
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)


def average_buffers(module: nn.Module) -> None:
    """Averages floating-point buffers over the ranks and takes the others from rank 0; a collective call.

    Each rank's BatchNorm has seen other batches; the mean of their running statistics describes all of them.
    """
    floating = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    others = [buffer for buffer in module.buffers() if not buffer.is_floating_point()]
    with torch.no_grad():
        if floating:
            # One collective for all of them, in float64: there the sum of equal values is exact and does not overflow,
            # so a mask or a table that no rank has touched stays what it is.
            # A module on a GPU may keep some of its buffers on the host.
            device = floating[0].device
            flat = _reachable(torch.cat([buffer.reshape(-1).to(device, torch.float64) for buffer in floating]))
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for buffer, mean in zip(
                floating, flat.split_with_sizes([buffer.numel() for buffer in floating]), strict=True
            ):
                buffer.copy_(mean.view_as(buffer))
    broadcast_tensors(others)


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it on this rank's GPU if the default group has only NCCL, which knows no host memory."""
    if tensor.is_cuda or dist.get_backend() != "nccl":
        return tensor
    return tensor.to(_gpu())


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
