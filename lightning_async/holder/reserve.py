"""Memory for copies that are made while updates wait."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Reserve"]

_Kind: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype]

# Below, a copy takes no longer than looking for its memory.
_LEAST_BYTES = 1 << 16


class Reserve:
    """Memory for one copy of each of some tensors on the host.

    The system gives memory page by page, when it is first written to, which takes several times as long as the copy
    itself. Here it is written to beforehand, where no lock is held.

    Args:
        tensors: what is to be copied; small ones, and those of a GPU, are not reserved for.

    Examples:
        >>> exp_avg = torch.zeros(100_000)
        >>> reserve = Reserve([exp_avg])
        >>> torch.equal(reserve.copy(exp_avg), exp_avg)
        True
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._free: dict[_Kind, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.nbytes >= _LEAST_BYTES:
                memory = torch.empty_like(tensor, requires_grad=False)
                self._free[_kind(memory)].append(memory.zero_())

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that owns its memory: a reserved one, or if there is none for such a tensor, memory that is new."""
        tensor = tensor.detach()
        free = self._free.get(_kind(tensor)) if tensor.device.type == "cpu" else None
        return free.pop().copy_(tensor) if free else tensor.clone()


def _kind(tensor: Tensor) -> _Kind:
    return tensor.shape, tensor.stride(), tensor.dtype
