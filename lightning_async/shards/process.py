"""A follower's process, as rank 0 sees it; `follower_main.py` is what runs there."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from lightning_async.exchange.child_process import START_TIMEOUT_S, ChildProcess
from lightning_async.runtime.failure import FailureLatch, RunFailure, describe_error
from lightning_async.shards.followers import FollowerLink, Report
from lightning_async.shards.operations import Operation

__all__ = ["ShardProcess", "ShardProcessError"]


class ShardProcessError(RuntimeError):
    """A follower's process could not be started."""


class ShardProcess:
    """A process that holds one shard.

    It begins to import when this is made, and ends with `end` or with this process, however that ends. That it ends or
    stops by itself, or comes to something else than the sequencing holder, is a failure of rank 0.

    Args:
        shard: number of the shard, from 1.
        start_timeout_s: seconds that it may take to start.
        forks: see `ChildProcess`.
    """

    def __init__(self, shard: int, start_timeout_s: float = START_TIMEOUT_S, forks: bool = False) -> None:
        self.shard = shard
        self.name = f"its process for shard {shard} of the holder"
        self._start_timeout_s = start_timeout_s
        self._numbers = itertools.count(1)
        self._reports: dict[int, Report] = {}
        self._sending = threading.Lock()
        self._latch: FailureLatch | None = None
        self._child = ChildProcess("lightning_async.shards.follower_main", self.name, self._take_message, forks=forks)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def watch(self, latch: FailureLatch, timeout_s: float) -> None:
        """Waits until it runs, and watches over it from then on; idempotent.

        Args:
            latch: the run's failure latch.
            timeout_s: seconds without a sign of life after which it counts as lost.

        Raises:
            ShardProcessError: if it does not start.
        """
        if self._latch is not None:
            return
        if (trouble := self._child.wait_until_ready(self._start_timeout_s)) is not None:
            raise ShardProcessError(f"{trouble}; what it printed stands above. Leave holder_shards out to do without")
        self._latch = latch
        self._child.watch(latch, timeout_s)
        self._send(("watch", timeout_s, None))

    def open(self, report: Report) -> FollowerLink:
        """A link to a new follower in it; the one before stays until a worker's memory is attached to this one.

        Args:
            report: told what is done, in a thread of this process.
        """
        number = next(self._numbers)
        self._reports[number] = report
        return _Link(self.name, lambda place, operation: self._send((number, place, operation)))

    def end(self) -> None:
        """Ends the process; idempotent."""
        self._child.end(None)

    def _send(self, message: Any) -> None:
        with self._sending:
            self._child.send(message)

    def _take_message(self, message: tuple[int, int, str | None, str | None]) -> None:
        number, place, error, answer = message
        assert self._latch is not None
        if error is not None:
            self._latch.trip(RunFailure(0, f"{self.name} failed: {error}"))
            return
        try:
            self._reports[number](place, answer)
        except Exception as raised:
            # Workers wait for what would have been sent, and nobody else hears of this shard.
            self._latch.trip(RunFailure(0, f"the thread that hears of a shard failed: {describe_error(raised)}"))


class _Link(FollowerLink):
    def __init__(self, name: str, send: Callable[[int, Operation], None]) -> None:
        self.name = name
        self._send = send

    def send(self, place: int, operation: Operation) -> None:
        self._send(place, operation)
