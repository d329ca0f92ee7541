"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["usable_cores"]

# The quota and its period, in microseconds: of cgroup v2 in one file, of v1 in two.
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may run on, or fewer where a container has a quota of time on them.

    Args:
        cgroup: where the container's limits are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota([cgroup / file for file in files]) for files in _QUOTAS)
    return min([cores, *(max(1, math.ceil(quota)) for quota in quotas if quota is not None)])


def _quota(files: Sequence[Path]) -> float | None:
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        # "max" and -1 stand for no quota.
        return int(quota) / int(period) if quota.isdigit() else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
