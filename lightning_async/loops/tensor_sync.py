"""Tensors that every rank must share in the synchronous phase: broadcast and averaged over the strategy's own group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_async.runtime.meeting import Meeting
from lightning_async.runtime.process_groups import exchange_group

__all__ = ["average", "average_unlike", "broadcast_tensors", "set_meeting", "take_unlike_from_rank_0"]

_DIGEST_CHUNK = 1 << 20

# Where the ranks meet, if the run goes on without those that it loses. Process-wide, as the process groups are.
_meeting: Meeting | None = None


def set_meeting(meeting: Meeting | None) -> None:
    """Shares tensors by way of rank 0 from here on, past the process groups; None goes back to these."""
    global _meeting
    _meeting = meeting


def broadcast_tensors(tensors: Iterable[Tensor], device: torch.device | None = None) -> None:
    """Overwrites the tensors with rank 0's, in place; a collective call.

    Args:
        tensors: what to share.
        device: where the group can send them from, if they may lie elsewhere.
    """
    for tensor in tensors:
        with torch.no_grad():
            if _meeting is not None:
                mine: Any = tensor.detach().cpu() if _meeting.is_host else None
                _write(tensor.detach(), _meeting.gather(mine, "broadcast_tensors")[0])
                continue
            shared = _reachable(tensor.detach().to(device or tensor.device).contiguous())
            # As bytes: Gloo of torch 2.8 knows no complex numbers, and NCCL no 16-bit integers.
            dist.broadcast(shared.reshape(-1).view(torch.uint8), src=0, group=exchange_group())
            _write(tensor, shared)


def average_unlike(tensors: Iterable[Tensor]) -> None:
    """Averages those floating-point tensors that are not alike on all ranks; others become rank 0's.

    A collective call. For what may be large and is seldom touched, such as frozen layers: the ranks compare digests
    first.
    """
    for tensor in _unlike(tensors):
        if tensor.is_floating_point():
            # One by one: there may be no memory for a copy of all of them.
            average([tensor])
        else:
            broadcast_tensors([tensor])


def take_unlike_from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Overwrites those tensors with rank 0's that are not alike on all ranks; a collective call."""
    broadcast_tensors(_unlike(tensors))


def average(tensors: Sequence[Tensor]) -> None:
    """Gives every rank the mean of floating-point tensors, in place; a collective call."""
    if not tensors:
        return
    with torch.no_grad():
        # One collective for all of them, in float64: there the sum of equal values is exact and does not overflow,
        # so a mask or a table that no rank has touched stays what it is.
        # A module on a GPU may keep some of its buffers on the host.
        device = tensors[0].device
        flat = torch.cat([tensor.detach().reshape(-1).to(device, torch.float64) for tensor in tensors])
        flat = _mean_of_ranks(flat)
        for tensor, mean in zip(tensors, flat.split_with_sizes([tensor.numel() for tensor in tensors]), strict=True):
            _write(tensor, mean.view_as(tensor))


def _mean_of_ranks(flat: Tensor) -> Tensor:
    if _meeting is not None:
        return torch.stack(_meeting.gather(flat.cpu(), "average")).mean(0)
    flat = _reachable(flat)
    dist.all_reduce(flat, group=exchange_group())
    flat /= dist.get_world_size()
    return flat


def _write(tensor: Tensor, value: Tensor) -> None:
    value = value.to(tensor.device, tensor.dtype)
    # Buffers that are views of one element (`expand`) cannot be written, and need not be.
    if torch.equal(tensor, value):
        return
    # Validation, which Lightning runs in inference mode, may have made it.
    with torch.inference_mode(tensor.is_inference()):
        tensor.copy_(value)


def _unlike(tensors: Iterable[Tensor]) -> list[Tensor]:
    tensors = list(tensors)
    if not tensors:
        return []
    highest = torch.stack([_digest(tensor).cpu() for tensor in tensors])
    if _meeting is not None:
        everyone = torch.stack(_meeting.gather(highest, "digests"))
        alike = (everyone == everyone[0]).all(0).tolist()
        return [tensor for tensor, same in zip(tensors, alike, strict=True) if not same]
    highest = _reachable(highest)
    lowest = highest.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=exchange_group())
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=exchange_group())
    return [tensor for tensor, unlike in zip(tensors, (highest != lowest).tolist(), strict=True) if unlike]


def _digest(tensor: Tensor) -> Tensor:
    """A sum of a tensor's bits, read as integers, each times a number of its place: another one for other values."""
    tensor = tensor.detach().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    digest = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits: Any = tensor.view(_INTEGERS[tensor.element_size()]).reshape(-1)
    for chunk in bits.split(_DIGEST_CHUNK):
        place = torch.arange(1, chunk.numel() + 1, device=chunk.device) * _ODD
        digest = digest * _ODD + (chunk.to(torch.int64) * (place ^ (place >> 29)) * _ODD).sum()
    return digest


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The golden ratio in 64 bits; products wrap around.
_ODD = -0x61C8864680B583EB


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it on this rank's GPU if the group has only NCCL, which knows no host memory."""
    if tensor.is_cuda or dist.get_backend() != "nccl":
        return tensor
    return tensor.to(_gpu())


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
