"""The process group of the strategy's own collectives.

User code, torchmetrics and Lightning's data utilities use ``torch.distributed``'s default group. A call of theirs that
not every rank makes must never be answered by a collective of the strategy's, so those run in a group of their own.
Process-wide, like the default group.
"""

from __future__ import annotations

import time
import weakref
from datetime import timedelta
from statistics import median
from typing import TypeAlias

import torch
import torch.distributed as dist

__all__ = ["exchange_group", "open_exchange_group", "time_all_reduce"]

# 16 MB.
_MOST_ELEMENTS = 1 << 22
_APART_S = 0.005
_Group: TypeAlias = "dist.ProcessGroup"

# The default group and the group that was opened beside it. Weak: torch alone decides how long they live, and Gloo's
# threads must be gone before the interpreter is.
_pair: tuple[weakref.ref[_Group], weakref.ref[_Group]] | None = None


def open_exchange_group(timeout: timedelta | None) -> None:
    """Opens the group beside the present default group, unless there is one; a collective call.

    Args:
        timeout: of its collectives; None for the backend's own.
    """
    global _pair
    if exchange_group() is not None or dist.get_world_size() == 1:
        return
    own = dist.new_group(timeout=timeout, group_desc="lightning_async")
    _pair = weakref.ref(_default_group()), weakref.ref(own)


def exchange_group() -> _Group | None:
    """The group of the strategy's own collectives; None, which stands for the default group, if none was opened."""
    if _pair is None or not dist.is_initialized() or _pair[0]() is not _default_group():
        return None
    return _pair[1]()


def time_all_reduce(elements: int, device: torch.device, repetitions: int = 7) -> float:
    """Seconds that an all-reduce of float32 values takes, as DDP makes one in each step; a collective call.

    The ranks come to each from something else, as to the one of a step: one after the other takes a fraction of that.

    Args:
        elements: how many; of a large number a part is reduced, and the time scaled.
        device: where they are.
        repetitions: how often it is measured; the median counts.
    """
    part = min(max(elements, 1), _MOST_ELEMENTS)
    values = torch.zeros(part, device=device)
    seconds = []
    for _ in range(repetitions + 1):
        time.sleep(_APART_S)
        started = time.perf_counter()
        dist.all_reduce(values, group=exchange_group())
        # Waits for a device that reduces by itself.
        values[0].item()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:]) * max(elements, 1) / part


def _default_group() -> _Group:
    group = dist.group.WORLD
    assert group is not None
    return group
