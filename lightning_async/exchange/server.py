"""Rank 0's server: gives each worker its session, its channel, and a thread that serves it."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lightning_async.data.ledger import Ledger
from lightning_async.exchange.fence import EvictedError, Fence
from lightning_async.exchange.negotiation import ChannelNegotiator, WireNames
from lightning_async.exchange.options import Transport
from lightning_async.exchange.reactor import Reactor
from lightning_async.exchange.session import Session, SessionError
from lightning_async.exchange.state_transfer import send_state
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout, describe_model
from lightning_async.holder.placement import HolderPlacement
from lightning_async.holder.types import HalfUpdatedError
from lightning_async.runtime.alarms import Alarm
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError, describe_error
from lightning_async.runtime.handshake import HandshakeError, PeerInfo
from lightning_async.runtime.health import Sick
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.step_watch import StepWatch
from lightning_async.runtime.threads import Errands, PromptSwitching, use_one_thread
from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from lightning_async.transport.inprocess import in_process_pair
from lightning_async.transport.shm import SharedMemoryChannel

__all__ = ["OnLost", "Server"]

# Told a worker's rank and what has become of its connection.
OnLost: TypeAlias = Callable[[int, str], None]

log = logging.getLogger(__name__)

_WAKE_TIMEOUT_S = 1.0
# How often workers whose step takes too long are looked for.
_LOOK_S = 0.5


class Server:
    """Rank 0's sessions: one thread for all workers in shared memory, one for each other worker, none for its own.

    Args:
        holder: the holder.
        ledger: the ledger.
        layout: where each parameter lies; workers must have the same.
        groups: which hyperparameters each optimizer's param groups have; workers must have the same.
        latch: the run's failure latch.
        listener: where workers come in; None if rank 0 is alone.
        transport: how payloads travel.
        placement: where the holder lives; rank 0's host by default.
        workers: number of ranks.
        slots: how many control channels each worker has.
        on_refused: called when a connection or a request is refused.
        wire: what payloads are rounded to on a network.
        on_lost: told of a worker in the run whose connection was lost; None where that ends the run.
        predecessor: whose place this one takes; workers that it has evicted are still out.
        steps: watches how long workers take for a step; None where nobody does.
    """

    def __init__(
        self,
        holder: Holder,
        ledger: Ledger,
        layout: FlatLayout,
        groups: Sequence[HyperparamLayout],
        latch: FailureLatch,
        listener: Listener | None = None,
        transport: Transport = "auto",
        on_refused: Callable[[], None] = lambda: None,
        wire: WireNames = ("fp32", "fp32"),
        placement: HolderPlacement | None = None,
        workers: int = 1,
        slots: int = 1,
        on_lost: OnLost | None = None,
        predecessor: Server | None = None,
        steps: StepWatch | None = None,
    ) -> None:
        self._steps = steps
        # A worker may be in the middle of a step, and say nothing.
        self._looking = None if steps is None else Alarm(self._look_for_overdue)
        self._slots = slots
        self._on_lost = on_lost
        self._holder = holder
        self._ledger = ledger
        self._layout = layout
        self._groups = groups
        self._latch = latch
        self._listener = listener
        self._on_refused = on_refused
        self._placement = placement or HolderPlacement()
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._threads: dict[tuple[int, int], threading.Thread] = {}
        self._present: set[tuple[int, int]] = set()
        # Of each worker's slots that has ever come, in which incarnation it came last.
        self._incarnations: dict[tuple[int, int], int] = {}
        # The workers that may come, and of those that have what they come by and what keeps them out once evicted.
        self._expected: set[int] = set(range(workers)) if predecessor is None else set(predecessor._expected)
        self._fences: dict[int, Fence] = {}
        self._connections: dict[tuple[int, int], ControlConnection] = {}
        self._closing = False
        self._reactor = Reactor(holder, self._end_served, self._fail, use_one_thread)
        # A session's end may wait for the heartbeat's news while the reactor serves the others.
        self._ends = Errands("ends-of-sessions")
        self._switching = PromptSwitching()
        self._negotiator: ChannelNegotiator | None = None
        if listener is not None:
            self._negotiator = ChannelNegotiator(
                listener.address,
                transport,
                layout.numel,
                layout.dtype,
                wire,
                self._placement.device,
                self._placement.facts,
                workers,
                self._placement.attach,
                self._placement.needs_memory,
            )
            listener.on_refused = on_refused
            listener.on_control = self._answer_control
            listener.on_state = self._answer_state
        if self._looking is not None:
            self._looking.set(_LOOK_S)

    def local_channel(self, worker: int = 0, alone: bool = False) -> Channel:
        """The channel of rank 0's own worker; its requests are served in that worker's thread.

        Args:
            worker: its rank.
            alone: whether there is no other worker, so that it can have the holder's own parameters.
        """
        buffers = self._placement.buffers(self._layout.numel, self._layout.dtype)
        if alone:
            buffers = Buffers(buffers.gradient, self._holder.lend())
        mine, end, serve_with = in_process_pair(buffers)
        theirs = self._placement.stage(end, worker)
        serve_with(self._session(worker, theirs, 0, Fence(worker)).serve_one)
        with self._lock:
            self._channels.append(theirs)
        return mine

    def evict(self, worker: int) -> int:
        """Takes a worker out of the run: out of the barrier at once, whatever it was in the middle of.

        Returns:
            How many tickets it was handed and others get in its place.
        """
        with self._lock:
            self._expected.discard(worker)
        connections = self._shut_out(worker)
        for slot in range(self._slots):
            self._holder.leave(worker, slot)
        if self._steps is not None:
            self._steps.forget(worker)
        returned = self._ledger.evict(worker)
        for connection in connections:
            # Its session ends, if it does not know yet.
            connection.shutdown()
        return returned

    def let_in(self, worker: int) -> None:
        """Has a worker come that was evicted, or comes in addition; it takes part once it is admitted."""
        # What came for it before has not taken part, or no longer does.
        for connection in self._shut_out(worker):
            connection.shutdown()
        with self._lock:
            self._expected.add(worker)
        if self._listener is not None:
            self._listener.expect(worker)

    def _shut_out(self, worker: int) -> list[ControlConnection]:
        """Closes the fence of a worker's present incarnation; returns what it came by."""
        with self._lock:
            fence = self._fences.pop(worker, None)
            connections = [self._connections.pop(key) for key in list(self._connections) if key[0] == worker]
            self._present -= {key for key in self._present if key[0] == worker}
        if fence is not None:
            fence.close()
        return connections

    def on_sick(self, sick: Sick) -> None:
        """Takes a sick worker out, or ends the run for it; returns at once, also under the holder's lock."""
        self._ends.start()
        if self._on_lost is None or sick.everyone:
            self._ends.run(lambda: self._latch.trip(RunFailure(sick.worker, sick.reason)))
        else:
            self._ends.run(functools.partial(self._on_lost, sick.worker, sick.reason))

    def close(self, timeout_s: float = 5.0) -> None:
        """Takes no more workers and waits for the sessions to end, at most ``timeout_s`` each; idempotent."""
        if self._listener is not None:
            self._listener.on_control = self._listener.on_state = None
        if self._looking is not None:
            self._looking.close()
        with self._lock:
            self._closing = True
            threads, channels = list(self._threads.values()), list(self._channels)
            self._channels.clear()
        patience_s = 0.0 if self._latch.failure is not None else timeout_s
        self._reactor.close(patience_s)
        self._ends.close(_WAKE_TIMEOUT_S)
        for thread in threads:
            thread.join(timeout=patience_s)
        # What a thread may still wait for will not come. A thread that is left in NCCL's code would abort the process
        # when it comes back while the interpreter shuts down.
        if self._negotiator is not None:
            self._negotiator.close()
        for channel in channels:
            channel.close()
        deadline = time.monotonic() + _WAKE_TIMEOUT_S
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._switching.stop()

    def _look_for_overdue(self) -> None:
        assert self._steps is not None and self._looking is not None
        for sick in self._steps.overdue(time.monotonic()):
            self.on_sick(sick)
        if not self._closing:
            self._looking.set(_LOOK_S)

    def _session(self, worker: int, channel: Channel, slot: int, fence: Fence) -> Session:
        shared = (self._holder, self._ledger, self._layout, self._groups)
        return Session(worker, channel, *shared, slot, fence, self._steps, self.on_sick, self._placement.deliver)

    def _answer_control(self, peer: PeerInfo, connection: ControlConnection) -> None:
        theirs = peer.claims.get("model")
        for key, mine in describe_model(self._layout, self._groups).items():
            other = theirs.get(key) if isinstance(theirs, dict) else None
            if other != mine:
                raise HandshakeError(
                    f"rank {peer.rank} has {key} = {other}, rank 0 has {mine}; "
                    "every rank must build the same model and optimizers"
                )
        assert self._negotiator is not None
        self._negotiator.check(peer)
        fence = self._let_in(peer, connection)
        try:
            self._start_session(peer, connection, fence)
        except BaseException:
            self._forget(fence, peer.slot)
            raise

    def _let_in(self, peer: PeerInfo, connection: ControlConnection) -> Fence:
        """Notes that a worker's slot is here, once; returns the fence of its incarnation.

        Raises:
            HandshakeError: if that slot was not agreed on, is here or has been.
        """
        if peer.slot not in range(self._slots) or peer.overlaps != (self._slots > 1):
            raise HandshakeError(
                f"rank {peer.rank} comes for its slot {peer.slot} with overlap={peer.overlaps}, and every "
                f"rank has {self._slots} with overlap={self._slots > 1}; give all ranks the same strategy"
            )
        slot = (peer.rank, peer.slot)
        with self._lock:
            if peer.rank not in self._expected:
                raise HandshakeError(f"rank {peer.rank} was taken out of the run")
            if slot in self._present:
                raise HandshakeError(f"rank {peer.rank} is here already")
            if peer.incarnation <= self._incarnations.get(slot, -1):
                raise HandshakeError(
                    f"rank {peer.rank} was here and has left; what comes after its incarnation "
                    f"{self._incarnations[slot]} cannot be incarnation {peer.incarnation}"
                )
            self._incarnations[slot] = peer.incarnation
            self._present.add(slot)
            self._connections[slot] = connection
            fence = self._fences.get(peer.rank)
            if fence is None or fence.incarnation != peer.incarnation:
                fence = self._fences[peer.rank] = Fence(peer.rank, peer.incarnation)
            return fence

    def _start_session(self, peer: PeerInfo, connection: ControlConnection, fence: Fence) -> None:
        self._switching.start()
        self._ends.start()
        thread = threading.Thread(
            target=self._serve,
            args=(peer, connection, fence),
            name=f"session-{peer.rank}",
            daemon=True,
        )
        thread.start()
        with self._lock:
            self._threads[peer.rank, peer.slot] = thread

    def _answer_state(self, peer: PeerInfo, connection: ControlConnection) -> None:
        index = peer.claims.get("optimizer")
        if not isinstance(index, int) or not 0 <= index < len(self._groups):
            raise HandshakeError(f"it asks for the state of optimizer {index} of {len(self._groups)}")
        assert self._listener is not None
        send_state(connection, lambda: self._holder.optimizer_state(index), self._listener.address.timeout_s)

    def _serve(self, peer: PeerInfo, connection: ControlConnection, fence: Fence) -> None:
        assert self._negotiator is not None
        error: BaseException | None = None
        channel: Channel | None = None
        try:
            self._placement.bind_thread()
            channel = self._placement.stage(self._negotiator.open(peer, connection), peer.rank)
            with self._lock:
                self._channels.append(channel)
            session = self._session(peer.rank, channel, peer.slot, fence)
            if isinstance(channel, SharedMemoryChannel):
                self._reactor.add(session, connection)
                return
            use_one_thread()
            while not session.finished:
                session.serve_one()
        except Exception as raised:
            error = raised
        try:
            self._end(fence, peer.slot, error)
        finally:
            if isinstance(error, (SessionError, EvictedError)) and channel is not None:
                # The worker may be waiting for the payload of the refused request to be taken.
                channel.close()
            connection.close()

    def _end_served(self, session: Session, error: BaseException | None) -> None:
        self._ends.run(functools.partial(self._end, session.fence, session.slot, error))

    def _fail(self, error: BaseException) -> None:
        self._latch.trip(RunFailure(0, f"the thread that serves the workers failed: {describe_error(error)}"))

    def _end(self, fence: Fence, slot: int, error: BaseException | None) -> None:
        self._forget(fence, slot)
        if error is None:
            return
        try:
            self._judge(fence, error)
        except Exception as another:
            self._fail(another)

    def _forget(self, fence: Fence, slot: int) -> None:
        key = (fence.worker, slot)
        with self._lock:
            # Those of an evicted worker may be its next incarnation's by now.
            if not fence.closed:
                self._present.discard(key)
                self._connections.pop(key, None)

    def _judge(self, fence: Fence, error: BaseException) -> None:
        """Ends the run for what has ended the session of a worker, unless the run or the worker has ended before."""
        worker = fence.worker
        if isinstance(error, WorkerFailedError):
            log.debug("the session of rank %d ends with the run", worker)
        elif fence.closed:
            log.debug("the session of rank %d, which was taken out of the run, ends: %s", worker, error)
        elif isinstance(error, SessionError):
            self._on_refused()
            self._latch.trip(RunFailure(worker, str(error)))
        elif isinstance(error, HandshakeError):
            self._latch.trip(RunFailure(worker, str(error)))
        elif isinstance(error, (WireError, ChannelClosedError)):
            if self._closing:
                log.debug("the session of rank %d ends as all do: %s", worker, error)
            elif self._on_lost is not None:
                self._on_lost(worker, str(error))
            else:
                self._latch.explain_loss(lambda: RunFailure(worker, str(error)))
        elif isinstance(error, HalfUpdatedError):
            # What has broken the update off says so itself, a moment later.
            self._latch.explain_loss(lambda: RunFailure(0, str(error)))
        else:
            # Whatever goes wrong here must end the run: the worker waits for an answer. First of all, since there may
            # be no memory to log it.
            self._latch.trip(RunFailure(0, f"the session of rank {worker} failed: {describe_error(error)}"))
            log.error("the session of rank %d failed", worker, exc_info=error)
