"""Who takes part in a run, from a process's launch to its end, and what a failure means in this process."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch.distributed as dist

from lightning_async.runtime.alarms import Alarm
from lightning_async.runtime.collective_watch import CollectiveWatch
from lightning_async.runtime.elastic import forget_failure, is_supervised, record_failure
from lightning_async.runtime.failure import (
    ExitGuard,
    FailureLatch,
    RunFailure,
    WorkerFailedError,
    describe_error,
    end_process,
    say,
)
from lightning_async.runtime.handshake import HEARTBEAT, Address, handshake
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.rendezvous import share_address

__all__ = ["Membership", "guard_shutdown"]

# What watches over the ranks (torchrun, the spawning process) takes the first that exits for the culprit: the rank
# at fault or, on rank 0's host, rank 0, which says who it was. Under torchrun the others wait for twice as long.
_SURVIVOR_DELAY_S = 2.0
_GRACE_S = 5.0
# What the interpreter and Gloo may take to shut down after a failure.
_SHUTDOWN_S = 5.0
# How much later than this one rank 0 may come to the same failure.
_COMMON_FAILURE_S = 1.0
_LOST_PEER_WORDS = ("gloo", "nccl", "connection", "socket", "timed out", "store")

_a_run_has_failed = threading.Event()


class Membership:
    """One process's membership in a run.

    Args:
        rank: this rank.
        worker_timeout_s: seconds without a sign of life after which a rank counts as lost.
        describe_end: asked how a rank's process ended, on rank 0.
        graceful: exception types with which all ranks leave together; they are no failure.
        exit_process: see `ExitGuard`.
        has_stepped: whether this rank has trained on a batch: a mistake that all ranks make comes before.
    """

    def __init__(
        self,
        rank: int,
        worker_timeout_s: float,
        describe_end: Callable[[int], str | None] = lambda rank: None,
        graceful: tuple[type[BaseException], ...] = (),
        exit_process: Callable[[int], object] = os._exit,
        has_stepped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank = rank
        self.latch = FailureLatch()
        self.listener: Listener | None = None
        self.address: Address | None = None
        self._unexplained = RunFailure(rank, "an error that could not be described: out of memory", announced=True)
        # What a failed run in this process has left, and this one has outlived.
        forget_failure()
        supervised = is_supervised()
        self._delay_s = _SURVIVOR_DELAY_S * (2 if supervised and rank > 0 else 1)
        self._guard = ExitGuard(
            rank,
            self.latch,
            _GRACE_S + (1.0 if supervised and rank > 0 else 0.0),
            exit_process,
            before_exit=lambda failure: record_failure(rank, failure),
        )
        self._heartbeats: Heartbeats | None = None
        self._worker_timeout_s = worker_timeout_s
        self._describe_end = describe_end
        self._graceful = graceful
        self._has_stepped = has_stepped

    def _may_be_common(self, error: BaseException) -> bool:
        return isinstance(error, Exception) and not isinstance(error, MemoryError) and not self._has_stepped()

    def meet(
        self, world_size: int, main_address: str, broadcast: Callable[[str], str], gather: Callable[[str], list[str]]
    ) -> None:
        """Opens rank 0's listener and ties every other rank's heartbeat to it; a collective call.

        Args:
            world_size: number of ranks; nothing is opened for one.
            main_address: what ranks on other hosts reach rank 0's by.
            broadcast: gives every rank rank 0's string.
            gather: gives every rank each rank's string.
        """
        if world_size == 1 or self._heartbeats is not None:
            return
        watch = CollectiveWatch(self.rank, world_size, self._worker_timeout_s)
        self._heartbeats = Heartbeats(self.rank, self.latch, self._worker_timeout_s, self._describe_end, watch=watch)
        heartbeats = self._heartbeats

        def listen(host: str) -> Address:
            self.listener = Listener(host, world_size, heartbeats, self._worker_timeout_s)
            return self.listener.address

        self.address = share_address(self.rank, main_address, listen, broadcast, gather)
        if self.rank == 0:
            return
        self._heartbeats.add(0, handshake(self.address, self.rank, HEARTBEAT)[0])

    def share(self, address: str, broadcast: Callable[[str], str]) -> str:
        """Gives every rank the address of another listener of this run, as JSON; a collective call.

        The token is the run's, which every rank has: it is not told again.

        Args:
            address: rank 0's; empty if there is none.
            broadcast: gives every rank rank 0's string.
        """
        found = broadcast(Address.from_json(address).without_token().as_json() if address else "")
        if not found or self.address is None:
            return found
        return replace(Address.from_json(found), token=self.address.token).as_json()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Runs this rank's part; turns its error into everyone's end, and another rank's end into this one's error."""
        try:
            yield
        except BaseException as error:
            # There may be no memory left even to say so.
            self.latch.free_reserve()
            explained = self._explain_somehow(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            self._leave()

    def _leave(self) -> None:
        with ExitStack() as steps:
            # Each is done, whatever becomes of the others; the last comes first.
            if self.rank == 0 or self.latch.failure is None:
                # Rank 0's error is on its way up to the user's code, which may want to save something.
                steps.callback(self._guard.disarm)
            if self.latch.failure is not None:
                _a_run_has_failed.set()
            if self._heartbeats is not None:
                steps.callback(self._heartbeats.close)
            if self.listener is not None:
                steps.callback(self.listener.close)
            self.latch.free_reserve()

    def _explain_somehow(self, error: BaseException) -> BaseException:
        try:
            return self._explain(error)
        except Exception:
            # No memory, for instance. What is told was made when there was some.
            self.latch.trip(self._unexplained)
            return error

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, self._graceful):
            return error
        if isinstance(error, KeyboardInterrupt):
            # Ctrl+C reaches every rank, and is each one's own reason to end.
            self.latch.trip(RunFailure(self.rank, describe_error(error), announced=True))
            return error
        if isinstance(error, WorkerFailedError):
            self.latch.trip(error.failure)
        failure = self.latch.failure
        if failure is None and self.rank > 0 and self._heartbeats is not None and self._may_be_common(error):
            # A mistake that all ranks make is told by rank 0.
            common = self.latch.wait(_COMMON_FAILURE_S)
            failure = common if common is not None and common.reason == describe_error(error) else None
        if failure is None and _may_be_lost_peer(error):
            failure = self.latch.explain_loss(lambda: RunFailure(self.rank, describe_error(error), announced=True))
        if failure is None or failure.rank == self.rank:
            failure = RunFailure(self.rank, describe_error(error), announced=True)
            self.latch.trip(failure)
            record_failure(self.rank, failure, error)
            return error
        if self.rank == 0:
            time.sleep(self._delay_s)
            record_failure(0, failure)
            return error if isinstance(error, WorkerFailedError) else WorkerFailedError(failure)
        if not failure.announced:
            say(self.rank, str(failure))
        if failure.announced or is_supervised():
            time.sleep(self._delay_s)
        record_failure(self.rank, failure)
        # Rank 0, or the rank at fault, tells the user; a traceback from every rank would bury it.
        return SystemExit(1)


def guard_shutdown() -> None:
    """Ends this process if it does not come to its end after a failed run; for ``atexit``."""
    if _a_run_has_failed.is_set():
        Alarm(_end_now).set(_SHUTDOWN_S)


def _end_now() -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        end_process()


def _may_be_lost_peer(error: BaseException) -> bool:
    # ConnectionError: also of a channel that ends while it is being agreed on.
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(word in describe_error(error).lower() for word in _LOST_PEER_WORDS)
