"""Rank 0's listener: lets the run's own ranks in and refuses everyone else by name.

One thread accepts connections and hears all handshakes. What a stranger can take of rank 0 is bounded: the number of
handshakes under way, the time that each may last as a whole, the bytes that are kept of it, the rate at which
connections are taken, and the lines in the log.
"""

from __future__ import annotations

import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lightning_async.runtime.failure import describe_error
from lightning_async.runtime.handshake import (
    CONTROL,
    HANDSHAKE_TIMEOUT_S,
    HEARTBEAT,
    JOIN,
    LAUNCHER,
    MEETING,
    SEQUENCER,
    STATE,
    Address,
    HandshakeError,
    Introduction,
    PeerInfo,
)
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listening import listen
from lightning_async.runtime.pace import Pace
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.codec import HEADER_BYTES
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import MAX_TEXT_BYTES, WireError, fit_text
from lightning_async.transport.message import Challenge, Refuse, Welcome

__all__ = ["Listener"]

log = logging.getLogger(__name__)

# Between two tries to take a connection, when there is no descriptor for it.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# Less than a rank waits for the answer to its HELLO.
_LONGEST_TROUBLES_S = 5.0
_SHORT_HEARING_S = 0.5
_ROLES = (HEARTBEAT, CONTROL, STATE, MEETING, JOIN, LAUNCHER, SEQUENCER)
_REMEDY = "Where it is out of file descriptors, raise their limit (ulimit -n), or close what is not needed"
# More ranks than any run has come within a round trip; who is pushed out by strangers tries again.
_MOST_ARRIVALS = 128
_ARRIVALS_PER_S = 200
_FLOOD_PAUSE_S = 0.01
_MOST_BYTES = HEADER_BYTES + MAX_TEXT_BYTES
# Refusals that are logged one by one.
_LINES_PER_MINUTE = 30


class _Troubles:
    """How long a process has been unable to take connections; says so once."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._told = False
        self._pause_s = _FIRST_PAUSE_S

    @property
    def last_s(self) -> float:
        """Seconds since they began; 0 if there are none."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def add(self, error: BaseException) -> float:
        """Notes that it went wrong once more; returns how long to pause."""
        if self._since is None:
            self._since = time.monotonic()
        if not self._told:
            self._told = True
            log.warning("lightning_async: rank 0 cannot take connections, and keeps trying: %s. %s", error, _REMEDY)
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s

    def end(self) -> None:
        """Notes that it went well."""
        self._since, self._pause_s = None, _FIRST_PAUSE_S


@dataclass(eq=False, slots=True)
class _Arrival:
    """A connection whose other side has not proven yet that it belongs to the run."""

    connection: ControlConnection
    introduction: Introduction
    deadline: float


class Listener:
    """Accepts connections until closed, in one thread; a rank of the run then gets a short-lived thread of its own.

    A process that is out of descriptors or threads for a while keeps its listener: who comes then is taken later, and
    who has waited for long is told why.

    Args:
        host: the address that the workers reach rank 0 at; it listens at no other, where that can be.
        workers: number of ranks.
        heartbeats: takes the heartbeats; None where they come in at another listener.
        timeout_s: `worker_timeout`, which the workers are told.
        token: the run's; a new one by default.

    Raises:
        OSError: if there is no port to listen at.
        ValueError: if the environment allows none.
    """

    def __init__(
        self,
        host: str,
        workers: int,
        heartbeats: Heartbeats | None,
        timeout_s: float = 60.0,
        token: str | None = None,
    ) -> None:
        self._workers = workers
        self._heartbeats = heartbeats
        # Of each rank whose heartbeat has ever come, in which incarnation it came last.
        self._incarnations: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        # Served while training; before and after, a control channel finds nobody.
        self.on_control: Callable[[PeerInfo, ControlConnection], None] | None = None
        # Served while training, too, in the peer's own thread: answers one question.
        self.on_state: Callable[[PeerInfo, ControlConnection], None] | None = None
        # Takes the connections that ranks meet by, where a run goes on without those that it loses.
        self.on_meeting: Callable[[PeerInfo, ControlConnection], None] | None = None
        # Serves those that want to join the run, each in its own thread.
        self.on_join: Callable[[PeerInfo, ControlConnection], None] | None = None
        # Takes rank 0's connection, where this listener is that of a shard of the holder.
        self.on_sequencer: Callable[[PeerInfo, ControlConnection], None] | None = None
        # Serves what has started the ranks of a host, each in its own thread.
        self.on_launcher: Callable[[PeerInfo, ControlConnection], None] | None = None
        self.on_refused: Callable[[], None] = lambda: None
        # Whether rank 0 comes in here too, as where its training and the updates overlap, or the listener is a shard's.
        self.admits_rank_0 = False
        self._sockets = listen(host)
        port = self._sockets[0].getsockname()[1]
        self.address = Address(host, port, token or secrets.token_hex(16), timeout_s)
        self._wake_out, self._wake_in = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        for sock in self._sockets:
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        # The oldest first.
        self._arrivals: dict[_Arrival, None] = {}
        self._pace = Pace(_ARRIVALS_PER_S, _ARRIVALS_PER_S)
        self._lines = Pace(_LINES_PER_MINUTE, _LINES_PER_MINUTE / 60)
        self._unlogged = 0
        # Given up for a moment where there is no descriptor to take a peer with, to tell it so.
        self._spare: socket.socket | None = socket.socket()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        self._thread.start()

    def expect(self, rank: int) -> None:
        """Lets in a rank beyond those that the run was started with."""
        self._workers = max(self._workers, rank + 1)

    def close(self) -> None:
        """Lets nobody in any more; idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake_in.send(b"\0")
        self._thread.join(timeout=1.0)
        for arrival in list(self._arrivals):
            arrival.connection.close()
        for each in (self._selector, *self._sockets, self._wake_in, self._wake_out, self._spare):
            if each is not None:
                each.close()

    def _run(self) -> None:
        troubles = _Troubles()
        while not self._closing.is_set():
            self._step(troubles)

    def _step(self, troubles: _Troubles) -> None:
        try:
            self._serve_all(troubles)
        except (OSError, MemoryError) as error:
            self._closing.wait(troubles.add(error))
            if troubles.last_s > _LONGEST_TROUBLES_S:
                self._take_to_refuse(error)

    def _serve_all(self, troubles: _Troubles) -> None:
        now = time.monotonic()
        oldest = next(iter(self._arrivals), None)
        events = self._selector.select(None if oldest is None else max(0.0, oldest.deadline - now))
        if self._closing.is_set():
            return
        for arrival in [key.data for key, _ in events if key.data is not None]:
            self._hear(arrival)
        if oldest is not None:
            self._dismiss_late()
        # Asked, and not only when one is said to be readable: it is a cheap question.
        for accepted in filter(None, map(_take, self._sockets)):
            troubles.end()
            self._show_in(accepted)

    def _show_in(self, sock: socket.socket) -> None:
        try:
            connection = ControlConnection(sock)
            # An answer fits into the system's buffer.
            connection.settimeout(_SHORT_HEARING_S)
            arrival = _Arrival(connection, Introduction(self.address.token), time.monotonic() + HANDSHAKE_TIMEOUT_S)
            self._selector.register(connection.fileno(), selectors.EVENT_READ, arrival)
        except OSError as error:
            log.debug("a peer has gone again: %s", error)
            sock.close()
            return
        self._arrivals[arrival] = None
        if len(self._arrivals) > _MOST_ARRIVALS:
            self._forget(pushed_out := next(iter(self._arrivals)))
            # Without a word: a rank of the run takes that for a reason to try again.
            self._note_refused(pushed_out.connection, f"{_MOST_ARRIVALS} others have come since, and it was slow")
            pushed_out.connection.close()
        if not self._pace.allows():
            # A flood; training goes first.
            self._closing.wait(_FLOOD_PAUSE_S)

    def _dismiss_late(self) -> None:
        now = time.monotonic()
        for arrival in list(self._arrivals):
            if arrival.deadline > now:
                return
            self._forget(arrival)
            self._refuse(
                arrival.connection, f"its handshake timed out: it has not come to an end in {HANDSHAKE_TIMEOUT_S:g} s"
            )

    def _hear(self, arrival: _Arrival) -> None:
        if arrival not in self._arrivals:
            return
        connection = arrival.connection
        try:
            for message in connection.receive_available(_MOST_BYTES):
                answer = arrival.introduction.hear(message)
                if isinstance(answer, Challenge):
                    connection.send(answer)
                    continue
                self._forget(arrival)
                self._let_in(answer, arrival.introduction.role, connection)
                return
        except (WireError, ChannelClosedError, HandshakeError) as error:
            self._forget(arrival)
            self._refuse(connection, str(error))
        except Exception as error:
            self._forget(arrival)
            self._refuse(connection, f"rank 0 could not hear it: {describe_error(error)}")

    def _forget(self, arrival: _Arrival) -> None:
        if arrival in self._arrivals:
            del self._arrivals[arrival]
            self._selector.unregister(arrival.connection.fileno())

    def _let_in(self, peer: PeerInfo, role: str, connection: ControlConnection) -> None:
        """Takes a rank of the run."""
        if role == HEARTBEAT:
            self._welcome(peer, role, connection)
            return
        try:
            # A thread each: to answer may take a while.
            threading.Thread(target=self._welcome, args=(peer, role, connection), name="peer", daemon=True).start()
        except RuntimeError as error:
            log.debug("no thread for a peer: %s", error)
            self._welcome(peer, role, connection)

    def _welcome(self, peer: PeerInfo, role: str, connection: ControlConnection) -> None:
        try:
            comes_from_rank_0 = role == LAUNCHER or (role in (CONTROL, SEQUENCER) and self.admits_rank_0)
            first = 0 if comes_from_rank_0 else 1
            if role not in _ROLES or not first <= peer.rank < self._workers:
                raise HandshakeError(f"there is no {role!r} for rank {peer.rank} among {self._workers} ranks")
            if role == HEARTBEAT:
                self._take_heartbeat(peer, connection)
                return
            connection.settimeout(HANDSHAKE_TIMEOUT_S)
            answers = {
                CONTROL: self.on_control,
                STATE: self.on_state,
                MEETING: self.on_meeting,
                JOIN: self.on_join,
                SEQUENCER: self.on_sequencer,
                LAUNCHER: self.on_launcher,
            }
            answer = answers[role]
            if answer is None:
                raise HandshakeError("no training is under way")
            answer(peer, connection)
        except (WireError, ChannelClosedError, HandshakeError) as error:
            self._refuse(connection, str(error))
        except Exception as error:
            # No memory or no thread, for instance. A rank that is not told would wait for long.
            self._refuse(connection, f"rank 0 could not serve it: {describe_error(error)}")

    def _take_heartbeat(self, peer: PeerInfo, connection: ControlConnection) -> None:
        if self._heartbeats is None:
            raise HandshakeError("heartbeats come in at another listener")
        rank = peer.rank
        with self._lock:
            if self._heartbeats.watches(rank):
                raise HandshakeError(f"rank {rank} is here already")
            if peer.incarnation <= self._incarnations.get(rank, -1):
                raise HandshakeError(f"rank {rank} was here and has left")
            self._incarnations[rank] = peer.incarnation
        connection.send(Welcome(rank))
        self._heartbeats.add(rank, connection)

    def _take_to_refuse(self, trouble: BaseException) -> None:
        """Tells the peer who has waited longest why it is not let in."""
        if self._spare is None:
            return
        self._spare.close()
        self._spare = None
        try:
            accepted = next(filter(None, map(_take, self._sockets)), None)
            connection = None if accepted is None else ControlConnection(accepted)
        except (OSError, MemoryError) as error:
            log.debug("nor can it be told so: %s", error)
        else:
            if connection is not None:
                self._refuse(connection, f"rank 0 cannot take connections: {trouble}. {_REMEDY}", hears_first=True)
        try:
            self._spare = socket.socket()
        except OSError as error:
            log.debug("no descriptor to spare: %s", error)

    def _refuse(self, connection: ControlConnection, reason: str, hears_first: bool = False) -> None:
        if self._closing.is_set():
            connection.close()
            return
        # The reason may quote what the stranger sent.
        reason = fit_text(reason)
        self._note_refused(connection, reason)
        try:
            if hears_first:
                # To close what has something unread is to take back what was said.
                connection.settimeout(_SHORT_HEARING_S)
                connection.receive()
        except (WireError, ChannelClosedError) as error:
            log.debug("it has said nothing: %s", error)
        self._turn_away(connection, reason)

    def _note_refused(self, connection: ControlConnection, reason: str) -> None:
        self.on_refused()
        if not self._lines.allows():
            self._unlogged += 1
            return
        unlogged, self._unlogged = self._unlogged, 0
        before = f" (and {unlogged} before it)" if unlogged else ""
        log.warning("lightning_async refused a connection from %s: %s%s", connection.peer, reason, before)

    def _turn_away(self, connection: ControlConnection, reason: str) -> None:
        try:
            connection.send(Refuse(reason=reason))
        except ChannelClosedError as error:
            log.debug("could not tell it: %s", error)
        connection.close()


def _take(sock: socket.socket) -> socket.socket | None:
    """Who waits at a listening socket; None if nobody does, or has gone again."""
    try:
        return sock.accept()[0]
    except (BlockingIOError, ConnectionError):
        return None
