"""Rank 0's listener: one listening socket; lets the run's own ranks in and refuses everyone else by name."""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

from lightning_async.runtime.failure import describe_error
from lightning_async.runtime.handshake import (
    CONTROL,
    HANDSHAKE_TIMEOUT_S,
    HEARTBEAT,
    STATE,
    Address,
    HandshakeError,
    PeerInfo,
)
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError, fit_text
from lightning_async.transport.message import Hello, Message, Refuse, Welcome, kind_of

__all__ = ["Listener"]

log = logging.getLogger(__name__)

# Between two tries to take a connection, when there is no descriptor for it.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# Less than a rank waits for the answer to its HELLO.
_LONGEST_TROUBLES_S = 5.0
_SHORT_HEARING_S = 0.5
_REMEDY = "Where it is out of file descriptors, raise their limit (ulimit -n), or close what is not needed"


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


class Listener:
    """Accepts connections until closed; a short-lived thread per peer.

    A process that is out of descriptors or threads for a while keeps its listener: who comes then is taken later, and
    who has waited for long is told why.

    Args:
        host: the address that the workers reach rank 0 at; the loopback address keeps the listener shut to other hosts.
        workers: number of ranks.
        heartbeats: takes the heartbeats; None where they come in at another listener.
        timeout_s: `worker_timeout`, which the workers are told.
    """

    def __init__(self, host: str, workers: int, heartbeats: Heartbeats | None, timeout_s: float = 60.0) -> None:
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
        self.on_refused: Callable[[], None] = lambda: None
        # Whether rank 0's own worker comes in here too, as where its training and the updates overlap.
        self.admits_rank_0 = False
        self._socket = socket.create_server(("127.0.0.1" if host == "127.0.0.1" else "", 0), backlog=256)
        self._socket.setblocking(False)
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_hex(16), timeout_s)
        self._wake_out, self._wake_in = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        # Given up for a moment where there is no descriptor to take a peer with, to tell it so.
        self._spare: socket.socket | None = socket.socket()
        self._thread = threading.Thread(target=self._accept, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets nobody in any more; idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake_in.send(b"\0")
        self._thread.join(timeout=1.0)
        for each in (self._selector, self._socket, self._wake_in, self._wake_out, self._spare):
            if each is not None:
                each.close()

    def _accept(self) -> None:
        troubles = _Troubles()
        while not self._closing.is_set():
            try:
                self._selector.select()
                if self._closing.is_set():
                    return
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionError):
                # The peer has gone again.
                continue
            except (OSError, MemoryError) as error:
                self._closing.wait(troubles.add(error))
                if troubles.last_s > _LONGEST_TROUBLES_S:
                    self._take_to_refuse(error)
                continue
            troubles.end()
            self._show_in(sock)

    def _show_in(self, sock: socket.socket) -> None:
        try:
            connection = ControlConnection(sock)
        except OSError as error:
            log.debug("a peer has gone again: %s", error)
            sock.close()
            return
        try:
            # A thread each: a peer that connects and says nothing must not keep the others out.
            threading.Thread(target=self._welcome, args=(connection,), name="peer", daemon=True).start()
        except RuntimeError as error:
            log.debug("no thread for a peer: %s", error)
            self._welcome(connection)

    def _take_to_refuse(self, trouble: BaseException) -> None:
        """Tells the peer who has waited longest why it is not let in."""
        if self._spare is None:
            return
        self._spare.close()
        self._spare = None
        try:
            connection = ControlConnection(self._socket.accept()[0])
        except (OSError, MemoryError) as error:
            log.debug("nor can it be told so: %s", error)
        else:
            self._refuse(connection, f"rank 0 cannot take connections: {trouble}. {_REMEDY}", hears_first=True)
        try:
            self._spare = socket.socket()
        except OSError as error:
            log.debug("no descriptor to spare: %s", error)

    def _welcome(self, connection: ControlConnection) -> None:
        try:
            connection.settimeout(HANDSHAKE_TIMEOUT_S)
            peer, role = self._identify(connection.receive())
            if role == HEARTBEAT:
                self._take_heartbeat(peer, connection)
                return
            answer = self.on_control if role == CONTROL else self.on_state
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

    def _refuse(self, connection: ControlConnection, reason: str, hears_first: bool = False) -> None:
        if self._closing.is_set():
            connection.close()
            return
        # The reason may quote what the stranger sent.
        reason = fit_text(reason)
        log.warning("lightning_async refused a connection from %s: %s", connection.peer, reason)
        self.on_refused()
        try:
            if hears_first:
                # To close what has something unread is to take back what was said.
                connection.settimeout(_SHORT_HEARING_S)
                connection.receive()
        except (WireError, ChannelClosedError) as error:
            log.debug("it has said nothing: %s", error)
        self._turn_away(connection, reason)

    def _turn_away(self, connection: ControlConnection, reason: str) -> None:
        try:
            connection.send(Refuse(reason=reason))
        except ChannelClosedError as error:
            log.debug("could not tell it: %s", error)
        connection.close()

    def _identify(self, hello: Message) -> tuple[PeerInfo, str]:
        if not isinstance(hello, Hello):
            raise HandshakeError(f"it begins with {kind_of(hello).name} instead of HELLO")
        try:
            claims = json.loads(hello.claims)
            token, role = str(claims["token"]).encode(), str(claims["role"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise HandshakeError(f"its HELLO cannot be read: {error!r}") from error
        if not hmac.compare_digest(token, self.address.token.encode()):
            raise HandshakeError("it does not know this run's token")
        first = 0 if role == CONTROL and self.admits_rank_0 else 1
        if role not in (HEARTBEAT, CONTROL, STATE) or not first <= hello.worker < self._workers:
            raise HandshakeError(f"there is no {role!r} for rank {hello.worker} among {self._workers} ranks")
        return PeerInfo(hello.worker, hello.incarnation, claims), role
