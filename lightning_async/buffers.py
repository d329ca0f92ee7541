"""Tensors that every rank must share in the synchronous phase: broadcast and averaged over the default group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average_buffers", "average_unlike", "broadcast_tensors"]


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
    _average([buffer for buffer in module.buffers() if buffer.is_floating_point()])
    broadcast_tensors(buffer for buffer in module.buffers() if not buffer.is_floating_point())


def average_unlike(tensors: Iterable[Tensor]) -> None:
    """The same for those of ``tensors`` that are not alike on all ranks; a collective call.

    For what may be large and is seldom touched, such as frozen layers: the ranks compare digests first.
    """
    tensors = list(tensors)
    if not tensors:
        return
    highest = _reachable(torch.stack([_digest(tensor).cpu() for tensor in tensors]))
    lowest = highest.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    for tensor, unlike in zip(tensors, (highest != lowest).tolist(), strict=True):
        if unlike and tensor.is_floating_point():
            # One by one: there may be no memory for a copy of all of them.
            _average([tensor])
        elif unlike:
            broadcast_tensors([tensor])


def _average(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        return
    with torch.no_grad():
        # One collective for all of them, in float64: there the sum of equal values is exact and does not overflow,
        # so a mask or a table that no rank has touched stays what it is.
        # A module on a GPU may keep some of its buffers on the host.
        device = tensors[0].device
        flat = _reachable(torch.cat([tensor.detach().reshape(-1).to(device, torch.float64) for tensor in tensors]))
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(tensors, flat.split_with_sizes([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def _digest(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as integers: another one where ranks have come to different values."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it on this rank's GPU if the default group has only NCCL, which knows no host memory."""
    if tensor.is_cuda or dist.get_backend() != "nccl":
        return tensor
    return tensor.to(_gpu())


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
