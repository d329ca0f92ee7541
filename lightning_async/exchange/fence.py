"""A fence around one incarnation of a worker: once it is closed, nothing of that incarnation changes anything."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["EvictedError", "Fence"]


class EvictedError(RuntimeError):
    """The worker was taken out of the run; what it still sends counts for nothing."""


class Fence:
    """Lets a worker's sessions at the holder and the ledger, one step at a time, until the worker is evicted.

    A session may be in the middle of a request, in a thread of its own, when its worker is found dead. What it does
    inside the fence is done before `close` returns, and after that nothing is begun: what the worker was handed can be
    handed out again.

    Args:
        worker: the worker's rank.
        incarnation: how many workers of this rank came before.

    Examples:
        >>> fence = Fence(worker=2, incarnation=0)
        >>> with fence:
        ...     pass
        >>> fence.close()
        >>> with fence:
        ...     pass
        Traceback (most recent call last):
        lightning_async.exchange.fence.EvictedError: worker 2 (incarnation 0) was taken out of the run
    """

    def __init__(self, worker: int, incarnation: int = 0) -> None:
        self.worker = worker
        self.incarnation = incarnation
        self._lock = threading.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the worker is out of the run."""
        return self._closed

    def close(self) -> None:
        """Ends the worker's part; waits for a step under way. Idempotent."""
        with self._lock:
            self._closed = True

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._closed:
            self._lock.release()
            raise EvictedError(f"worker {self.worker} (incarnation {self.incarnation}) was taken out of the run")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()
