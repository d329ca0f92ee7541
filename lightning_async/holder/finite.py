"""Whether a gradient is finite: without NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["all_finite", "is_finite"]


def is_finite(values: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; one pass over it, and on a GPU one number that is waited for.

    A NaN or an infinity makes the sum one, whatever the others are. Finite values may add up to infinity, so a sum that
    is not finite is no proof: then the extremes decide, which are NaN where one value is.

    Args:
        values: floating-point numbers.

    Examples:
        >>> is_finite(torch.tensor([1.0, torch.inf])), is_finite(torch.tensor([torch.inf, -torch.inf]))
        (False, False)
        >>> is_finite(torch.full((9,), 3e38)), is_finite(torch.tensor([]))
        (True, True)
    """
    if math.isfinite(values.sum().item()):
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))


@torch.no_grad()
def all_finite(flat: Tensor, parts: Sequence[Tensor], present: Sequence[bool]) -> bool:
    """Whether gradients are finite.

    Args:
        flat: what all of them are parts of.
        parts: one for each parameter.
        present: which of the parameters have a gradient; what lies in the parts of others does not count.
    """
    if all(present):
        return is_finite(flat)
    return all(is_finite(part) for part, there in zip(parts, present, strict=True) if there)
