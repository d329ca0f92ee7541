"""The process of a shard that is reached over the network, as the rank sees it that has started it."""

from __future__ import annotations

import contextlib
import queue
from typing import Any

from lightning_async.exchange.child_process import START_TIMEOUT_S, ChildProcess
from lightning_async.exchange.shared_payload import SharedPayload
from lightning_async.runtime.failure import FailureLatch
from lightning_async.runtime.handshake import Address
from lightning_async.shards.operations import ShardSpec
from lightning_async.shards.process import ShardProcessError

__all__ = ["ShardServerProcess"]

_LOOK_S = 0.2


class ShardServerProcess:
    """A process that holds one shard and is followed up by rank 0 and all workers over the network.

    It begins to import when this is made. It ends when rank 0 says that the run is over, or with this process, however
    that ends. That it ends or stops by itself is a failure of this rank.

    Args:
        shard: number of the shard, from 1.
        rank: this rank.
        start_timeout_s: seconds that it may take to start.
        forks: see `ChildProcess`.
    """

    def __init__(self, shard: int, rank: int, start_timeout_s: float = START_TIMEOUT_S, forks: bool = False) -> None:
        self.shard = shard
        self.name = f"its process for shard {shard} of the holder"
        self._rank = rank
        self._start_timeout_s = start_timeout_s
        self._latch: FailureLatch | None = None
        self._answers: queue.SimpleQueue[tuple[str | None, Any]] = queue.SimpleQueue()
        self._child = ChildProcess(
            "lightning_async.shards.shard_server_main", self.name, self._answers.put, self._note_end, rank, forks
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def listen(self, host: str, workers: int, timeout_s: float, token: str, latch: FailureLatch) -> Address:
        """Waits until it runs, watches over it from then on, and has it listen.

        Args:
            host: the address that the other hosts reach this one at.
            workers: number of ranks.
            timeout_s: `worker_timeout`.
            token: the run's.
            latch: the run's failure latch.

        Returns:
            Where it is found, without the token.

        Raises:
            ShardProcessError: if it does not start, or cannot listen.
        """
        if (trouble := self._child.wait_until_ready(self._start_timeout_s)) is not None:
            raise ShardProcessError(f"{trouble}; what it printed stands above. Leave holder_shards out to do without")
        self._latch = latch
        self._child.watch(latch, timeout_s)
        self._child.send(("watch", self._rank, self.shard, timeout_s))
        return Address.from_json(self._ask("listen", host, workers, timeout_s, token))

    def offer(self, number: int, spec: ShardSpec) -> None:
        """Says what its next follower holds, as this host has made it.

        Args:
            number: the follower's.
            spec: of which rank 0 tells the numbers.

        Raises:
            ShardProcessError: if it cannot take it.
        """
        with SharedPayload(spec) as payload:
            self._ask("offer", number, payload.address)

    def end(self, waits: bool = True) -> None:
        """Ends it; idempotent.

        Args:
            waits: whether it goes on until rank 0 needs it no more, or the run has failed.
        """
        if waits and self._latch is not None and self._latch.failure is None and not self._child.is_gone:
            with contextlib.suppress(OSError):
                # If it is gone, its heartbeat says so.
                self._child.send(None)
            while self._latch.failure is None and not self._child.wait_until_gone(_LOOK_S):
                continue
        self._child.kill()
        self._child.end(None)

    def _ask(self, *question: Any) -> Any:
        self._child.send(question)
        try:
            error, answer = self._answers.get(timeout=self._start_timeout_s)
        except queue.Empty:
            error, answer = f"it has not answered in {self._start_timeout_s:g} s", None
        if error is not None:
            raise ShardProcessError(f"{self.name}: {error}")
        return answer

    def _note_end(self) -> None:
        self._answers.put(("it is gone", None))
