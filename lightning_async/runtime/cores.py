"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["holder_threads", "usable_cores"]

# More do not make memory faster on the hosts that are known.
_MOST_THREADS = 8

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


def holder_threads(cores: int, ranks: int, cores_of_a_rank: int) -> int:
    """How many threads the holder of a large model takes: the cores that training leaves, and one at least.

    Args:
        cores: that the processes of rank 0's host may use.
        ranks: on that host.
        cores_of_a_rank: what a rank's training keeps busy.

    Examples:
        >>> holder_threads(16, ranks=4, cores_of_a_rank=1), holder_threads(16, ranks=4, cores_of_a_rank=4)
        (8, 1)
        >>> holder_threads(4, ranks=1, cores_of_a_rank=1)
        3
    """
    return max(1, min(_MOST_THREADS, cores - ranks * cores_of_a_rank))


def _quota(files: Sequence[Path]) -> float | None:
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        # "max" and -1 stand for no quota.
        return int(quota) / int(period) if quota.isdigit() else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
