"""Which parts of whose gradients the shards have: a gradient gets its place when all of it is there."""

from __future__ import annotations

import threading
from collections import defaultdict

from lightning_async.runtime.failure import FailureLatch
from lightning_async.transport.base import ChannelClosedError

__all__ = ["Arrivals"]


class Arrivals:
    """What the shards but the first have told of parts that have come.

    Args:
        shards: their numbers.
        latch: the run's failure latch.
    """

    def __init__(self, shards: range, latch: FailureLatch) -> None:
        self._shards = shards
        self._latch = latch
        self._changed = threading.Condition()
        # The number of the last push of which a shard has its part, by worker and shard.
        self._arrived: dict[tuple[int, int], int] = defaultdict(int)
        self._lost: dict[int, str] = {}
        latch.subscribe(lambda failure: self._wake())

    def note(self, shard: int, worker: int, number: int) -> None:
        """A shard has its part of a worker's push."""
        with self._changed:
            self._arrived[worker, shard] = number
            self._changed.notify_all()

    def lose(self, shard: int, worker: int, reason: str) -> None:
        """Nothing more comes to a shard from a worker."""
        with self._changed:
            self._lost.setdefault(worker, f"its connection to shard {shard} of the holder is lost: {reason}")
            self._changed.notify_all()

    def wait(self, worker: int, number: int) -> None:
        """Returns when each shard has its part of a worker's push.

        Raises:
            ChannelClosedError: if the worker's connection to one of them is lost before.
            WorkerFailedError: if the run fails before.
        """

        def is_there() -> bool:
            return all(self._arrived[worker, shard] >= number for shard in self._shards)

        with self._changed:
            # The worker and the shards' processes are watched over: if one ends or stops, the run fails.
            self._changed.wait_for(lambda: is_there() or worker in self._lost or self._latch.failure is not None)
            if is_there():
                return
            lost = self._lost.get(worker)
        self._latch.check()
        raise ChannelClosedError(lost or "it is lost")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
