"""How much of a machine's cores the ranks keep busy: what a rank's step times mean depends on it."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from lightning_async.runtime.cores import usable_cores

__all__ = ["CpuMeter", "CpuUse"]


@dataclass(frozen=True, slots=True)
class CpuUse:
    """What one rank uses of its host while it trains.

    Args:
        host: name of the host.
        cores: cores that the rank's process may run on.
        used: cores that it keeps busy on average, over all its threads; 1.0 is one core all the time.
    """

    host: str
    cores: int
    used: float


class CpuMeter:
    """Measures this process from `start` to `stop`, again and again."""

    def __init__(self) -> None:
        self._cpu_s = self._wall_s = 0.0
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        """Training begins, or goes on."""
        self._started = (time.process_time(), time.perf_counter())

    def stop(self) -> CpuUse:
        """Training stops. Returns the use in all the time that was measured."""
        if self._started is not None:
            cpu_s, wall_s = self._started
            self._cpu_s += time.process_time() - cpu_s
            self._wall_s += time.perf_counter() - wall_s
            self._started = None
        return CpuUse(socket.gethostname(), usable_cores(), self._cpu_s / max(self._wall_s, 1e-9))
