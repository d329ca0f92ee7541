"""The heartbeat: a connection of its own per worker for signs of life and the news of a failure.

It is apart from the connection that carries requests, so that the training thread can wait for its reply directly,
while this room's one thread watches over every peer: the holder's process has one heartbeat per worker, a worker's
process one to the holder.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_async.runtime.collective_watch import CollectiveWatch
from lightning_async.runtime.failure import FailureLatch, RunFailure, describe_error
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.codec import encode
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError, fit_text
from lightning_async.transport.message import Abort, Beat, Evict, Goodbye, Message, kind_of

__all__ = ["Heartbeats"]

log = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 1.0


@dataclass
class _Peer:
    rank: int
    connection: ControlConnection
    last_seen: float
    # Whether it was sent the failure, or as much of it as there was memory for.
    told: bool = False
    sending: threading.Lock = field(default_factory=threading.Lock)


class Heartbeats:
    """Watches over peers and passes on the first failure; one thread.

    A peer is lost when its connection ends without a goodbye (a killed process: milliseconds) or when nothing has
    come from it for ``timeout_s`` (a stopped process, a cut link).

    Args:
        rank: this process's rank.
        latch: the run's failure latch: tripped when a peer is lost or reports a failure, and listened to.
        timeout_s: seconds without a sign of life after which a peer counts as lost.
        describe_end: asked for the reason when a peer's connection ends, for example its process's exit status.
        who: what stands before "gave no sign of life", where the peer is not the rank's main process.
        watch: asked at each beat which collective this rank waits in, and told where the others do.
        on_lost: told of a peer that is lost, or out of memory; trips the latch by default.
        on_evicted: told of a rank that rank 0 has taken out of the run.
        on_failed: told of a peer that has failed by itself; trips the latch by default.
        on_left: told of a peer that leaves the run by itself; None where ranks do not.
    """

    def __init__(
        self,
        rank: int,
        latch: FailureLatch,
        timeout_s: float,
        describe_end: Callable[[int], str | None] = lambda rank: None,
        who: str = "",
        watch: CollectiveWatch | None = None,
        on_lost: Callable[[RunFailure], object] | None = None,
        on_evicted: Callable[[RunFailure], object] = lambda failure: None,
        on_left: Callable[[RunFailure], object] | None = None,
        on_failed: Callable[[RunFailure], object] | None = None,
    ) -> None:
        self._on_left = on_left
        self._on_failed = on_failed
        self._on_lost = on_lost
        self._on_evicted = on_evicted
        self._collectives = watch
        self._who = f"{who} " if who else ""
        self._rank = rank
        self._latch = latch
        self._timeout_s = timeout_s
        self._beat_s = min(2.0, timeout_s / 4)
        # Made while there is memory.
        self._beat = encode(Beat(rank))
        self._goodbye = encode(Goodbye(rank))
        self._last_words = encode(Abort(rank, "out of memory"))
        self._describe_end = describe_end
        self._lock = threading.Lock()
        self._peers: dict[int, _Peer] = {}
        self._closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()
        latch.subscribe(self._pass_on)

    def watches(self, rank: int) -> bool:
        """Whether a peer of this rank is being watched over."""
        with self._lock:
            return rank in self._peers

    def add(self, rank: int, connection: ControlConnection) -> None:
        """Watches over another peer; its connection is owned from here on."""
        connection.settimeout(_SEND_TIMEOUT_S)
        connection.survive_cuts(self._timeout_s)
        # A thin link is busy with payloads.
        connection.go_first()
        peer = _Peer(rank, connection, time.monotonic())
        with self._lock:
            self._peers[rank] = peer
            self._selector.register(connection.fileno(), selectors.EVENT_READ, peer)
        self._wake()

    def evict(self, rank: int, reason: str) -> None:
        """Tells every peer that a rank is out of the run, that rank too, which is watched over no more."""
        words = encode(Evict(rank, fit_text(reason)))
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            self._send(peer, words)
            if peer.rank == rank:
                # What was sent stays to be read, should it come to life again.
                self._forget(peer)

    def say_that_it_leaves(self, reason: str) -> None:
        """Tells every peer that this rank leaves the run by itself."""
        words = encode(Evict(self._rank, fit_text(reason)))
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            self._send(peer, words)

    def close(self) -> None:
        """Says goodbye to every peer and stops; idempotent."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            peers = list(self._peers.values())
        failure = self._latch.failure
        for peer in peers:
            if failure is not None:
                # A goodbye alone would say that all is well.
                self._tell(peer, failure)
            self._send(peer, self._goodbye)
        self._wake()
        self._thread.join(timeout=5.0)
        for peer in peers:
            peer.connection.close()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _wake(self) -> None:
        self._wake_in.send(b"\0")

    def _pass_on(self, failure: RunFailure) -> None:
        with self._lock:
            # The rank at fault too, if its connection still stands: rank 0 may have refused a request of its.
            peers = list(self._peers.values())
        for peer in peers:
            self._tell(peer, failure)

    def _tell(self, peer: _Peer, failure: RunFailure) -> None:
        try:
            words = encode(Abort(failure.rank, fit_text(failure.reason)))
        except (MemoryError, WireError):
            words = self._last_words
        with peer.sending:
            if not peer.told:
                self._send_alone(peer, words)
                peer.told = True

    def _send(self, peer: _Peer, message: bytes) -> None:
        with peer.sending:
            self._send_alone(peer, message)

    def _send_alone(self, peer: _Peer, message: bytes) -> None:
        try:
            peer.connection.send_encoded(message)
        except ChannelClosedError:
            # The reading side learns of it too, and knows more: it sees the goodbye or abort that came before.
            log.debug("no longer reaches rank %d", peer.rank)

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:
            # Nobody would be watched over any more, and nobody have a sign of life from here.
            reason = f"{describe_error(error)} (while it watched over the other ranks)"
            self._latch.trip(RunFailure(self._rank, reason, announced=self._rank != 0))

    def _watch(self) -> None:
        last_round = time.monotonic()
        next_beat = last_round
        while not self._closing.is_set():
            events = self._selector.select(timeout=max(0.0, next_beat - time.monotonic()))
            if self._closing.is_set():
                return
            for key, _ in events:
                if key.data is None:
                    self._wake_out.recv(64)
                else:
                    self._read(key.data)
            now = time.monotonic()
            with self._lock:
                peers = list(self._peers.values())
            if now - last_round > self._timeout_s / 2:
                # This process itself was stopped: the silence was its own.
                for peer in peers:
                    peer.last_seen = now
            last_round = now
            if now >= next_beat:
                next_beat = now + self._beat_s
                self._give_signs_of_life(peers)
            for peer in peers:
                if now - peer.last_seen > self._timeout_s:
                    self._lose(peer, f"{self._who}gave no sign of life for {self._timeout_s:g} s (worker_timeout)")

    def _give_signs_of_life(self, peers: list[_Peer]) -> None:
        beat = self._beat
        if self._collectives is not None:
            if waiting := self._collectives.look():
                beat = encode(Beat(self._rank, fit_text(waiting)))
            if (stuck := self._collectives.failure()) is not None:
                self._latch.trip(stuck)
        failure = self._latch.failure
        for peer in peers:
            if failure is None:
                self._send(peer, beat)
            else:
                # This rank's part is over. A peer that has not heard so must not believe that it goes on.
                self._tell(peer, failure)

    def _read(self, peer: _Peer) -> None:
        try:
            messages = peer.connection.receive_available()
            peer.last_seen = time.monotonic()
            for message in messages:
                self._handle(peer, message)
        except ChannelClosedError as error:
            self._lose(peer, self._describe_end(peer.rank) or _describe_loss(error))
        except WireError as error:
            self._lose(peer, f"its heartbeat does not follow the protocol: {error}")

    def _handle(self, peer: _Peer, message: Message) -> None:
        if isinstance(message, Goodbye):
            self._forget(peer)
        elif isinstance(message, Abort):
            if message.worker == peer.rank:
                # Its end of the connection is about to vanish, which is then no news.
                self._forget(peer)
            by_itself = message.worker == peer.rank
            failure = RunFailure(message.worker, message.reason, self._rank != 0, by_itself)
            if by_itself and self._on_failed is not None:
                self._on_failed(failure)
            else:
                self._latch.trip(failure)
        elif isinstance(message, Evict) and message.worker == peer.rank and self._on_left is not None:
            self._on_left(RunFailure(message.worker, message.reason))
            self._forget(peer)
        elif isinstance(message, Evict):
            self._on_evicted(RunFailure(message.worker, message.reason, announced=True))
        elif isinstance(message, Beat):
            if self._collectives is not None:
                self._collectives.hear(peer.rank, message.waits_in)
        else:
            raise WireError(f"unexpected {kind_of(message).name} on a heartbeat")

    def _lose(self, peer: _Peer, reason: str) -> None:
        with self._lock:
            if self._peers.get(peer.rank) is not peer:
                # Taken out meanwhile: another worker may have its place.
                return
        failure = RunFailure(peer.rank, reason, lost=True)
        if self._on_lost is None:
            self._forget(peer)
            self._latch.trip(failure)
        else:
            # It is told, too, that it is out: it may only have been stopped.
            self._on_lost(failure)
            self._forget(peer)

    def _forget(self, peer: _Peer) -> None:
        with self._lock:
            if self._peers.get(peer.rank) is peer:
                del self._peers[peer.rank]
                self._selector.unregister(peer.connection.fileno())
                peer.connection.close()


def _describe_loss(error: ChannelClosedError) -> str:
    cause = error.__cause__
    if cause is None or isinstance(cause, ConnectionError):
        return "its process is gone: the connection was closed"
    # The system has given the connection up: no route, for instance.
    return f"it cannot be reached any more: {cause}"
