"""Who takes part in a run, from a process's launch to its end, and what a failure means in this process.

Above `frontdoor.py`, `lifeline.py` and `failure.py`; below `strategy.py`. Knows no Lightning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lightning_async.collective_watch import CollectiveWatch
from lightning_async.failure import ExitGuard, FailureLatch, RunFailure, WorkerFailedError, say
from lightning_async.frontdoor import LIFELINE, Address, FrontDoor, introduce
from lightning_async.lifeline import Lifelines

__all__ = ["Membership"]

# How long the lifeline's news may trail an error that a lost peer causes in a collective.
_NEWS_TIMEOUT_S = 3.0
# Whoever watches over the ranks (torchrun, the spawning process) takes the first that exits for the culprit.
_SURVIVOR_DELAY_S = 2.0
_LOST_PEER_WORDS = ("gloo", "nccl", "connection", "socket", "timed out", "store")


class Membership:
    """One process's membership in a run.

    Args:
        rank: this rank.
        worker_timeout_s: seconds without a sign of life after which a rank counts as lost.
        describe_end: asked how a rank's process ended, on rank 0.
        graceful: exception types with which all ranks leave together; they are no failure.
        exit_process: see `ExitGuard`.
    """

    def __init__(
        self,
        rank: int,
        worker_timeout_s: float,
        describe_end: Callable[[int], str | None] = lambda rank: None,
        graceful: tuple[type[BaseException], ...] = (),
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank = rank
        self.latch = FailureLatch()
        self.door: FrontDoor | None = None
        self.address: Address | None = None
        self._guard = ExitGuard(rank, self.latch, exit_process=exit_process)
        self._lifelines: Lifelines | None = None
        self._worker_timeout_s = worker_timeout_s
        self._describe_end = describe_end
        self._graceful = graceful

    def meet(self, world_size: int, host: str, broadcast: Callable[[str], str]) -> None:
        """Opens rank 0's front door and ties every other rank's lifeline to it; a collective call.

        Args:
            world_size: number of ranks; nothing is opened for one.
            host: the address that the other ranks reach rank 0 at.
            broadcast: gives every rank rank 0's string.
        """
        if world_size == 1 or self._lifelines is not None:
            return
        watch = CollectiveWatch(self.rank, world_size, self._worker_timeout_s)
        self._lifelines = Lifelines(self.rank, self.latch, self._worker_timeout_s, self._describe_end, watch=watch)
        if self.rank == 0:
            self.door = FrontDoor(host, world_size, self._lifelines)
            self.address = self.door.address
            broadcast(self.address.as_json())
            return
        self.address = Address.from_json(broadcast(""))
        self._lifelines.add(0, introduce(self.address, self.rank, LIFELINE)[0])

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Runs this rank's part; turns its error into everyone's end, and another rank's end into this one's error."""
        try:
            yield
        except BaseException as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            if self.door is not None:
                self.door.close()
            if self._lifelines is not None:
                self._lifelines.close()
            if self.rank == 0:
                # The error is on its way up to the user's code, which may want to save something.
                self._guard.disarm()

    def guard_exit(self) -> None:
        """Guards the rest of this process's life if the run has failed; for ``atexit``."""
        self._guard.rearm()

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, self._graceful):
            return error
        if isinstance(error, KeyboardInterrupt):
            # Ctrl+C reaches every rank, and is each one's own reason to end.
            self.latch.trip(RunFailure(self.rank, _describe(error), announced=True))
            return error
        if isinstance(error, WorkerFailedError):
            self.latch.trip(error.failure)
        failure = self.latch.failure
        if failure is None and _may_be_lost_peer(error):
            failure = self.latch.wait(_NEWS_TIMEOUT_S)
        if failure is None or failure.rank == self.rank:
            self.latch.trip(RunFailure(self.rank, _describe(error), announced=True))
            return error
        if self.rank == 0:
            time.sleep(_SURVIVOR_DELAY_S)
            return error if isinstance(error, WorkerFailedError) else WorkerFailedError(failure)
        if failure.announced:
            time.sleep(_SURVIVOR_DELAY_S)
        else:
            say(self.rank, str(failure))
        # Rank 0, or the rank at fault, tells the user; a traceback from every rank would bury it.
        return SystemExit(1)


def _may_be_lost_peer(error: BaseException) -> bool:
    # ConnectionError: also of a channel that ends while it is being agreed on.
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST_PEER_WORDS)


def _describe(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
