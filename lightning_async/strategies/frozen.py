"""A checkpoint that stays as it is while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

__all__ = ["frozen_copy", "tensors_in"]


def frozen_copy(checkpoint: dict[str, Any], owned: Collection[int] = ()) -> dict[str, Any]:
    """A copy of a checkpoint that shares nothing with what trains, but for tensors that nobody else has.

    Args:
        checkpoint: what Lightning and user code have put together.
        owned: the identities (``id``) of tensors in it that are not copied again.

    Examples:
        >>> import torch
        >>> alive, taken = torch.ones(2), torch.ones(2)
        >>> frozen = frozen_copy({"alive": alive, "taken": taken}, {id(taken)})
        >>> _ = alive.zero_()
        >>> frozen["alive"], frozen["taken"] is taken
        (tensor([1., 1.]), True)
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_in(checkpoint):
        if id(tensor) in owned:
            memo[id(tensor)] = tensor
        elif type(tensor) is Tensor and not (tensor.is_leaf and tensor.requires_grad):
            # A view would bring all that it is a view of, and what was computed cannot be copied with its graph.
            memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(checkpoint, memo)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (dict, list, tuple)) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend(each.values() if isinstance(each, dict) else each)
