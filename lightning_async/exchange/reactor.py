"""The reactor: one thread that serves every worker whose payloads lie in shared memory.

A thread per worker would have all of them compete for the interpreter's lock with each other and with rank 0's own
training; here a request costs no hand-over. Nothing blocks in this thread: a request that the barrier holds back is put
aside and resumed after the next change.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lightning_async.exchange.fence import EvictedError
from lightning_async.exchange.joint_service import serve_together
from lightning_async.exchange.session import Arrived, Session
from lightning_async.holder.holder import Holder
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Push, kind_of

__all__ = ["Reactor"]


@dataclass(eq=False, slots=True)
class _Client:
    session: Session
    connection: ControlConnection
    # The request under way that the barrier holds back.
    held_back: Iterator[None] | None = None


class Reactor:
    """Serves sessions in one thread, which starts with the first of them.

    Args:
        holder: of the sessions; tells of changes that a held-back request may have waited for.
        on_ended: called in the reactor's thread when a session ends, with its error or None; must not wait.
        on_failed: called in the reactor's thread if that itself fails, and serves nobody any more.
        prepare_thread: called first in the reactor's thread.
    """

    def __init__(
        self,
        holder: Holder,
        on_ended: Callable[[Session, BaseException | None], None],
        on_failed: Callable[[BaseException], object],
        prepare_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._holder = holder
        self._on_ended = on_ended
        self._on_failed = on_failed
        self._prepare_thread = prepare_thread
        self._lock = threading.Lock()
        self._clients: set[_Client] = set()
        # In the order of their arrival, which is the order in which they are tried again.
        self._held_back: dict[_Client, None] = {}
        self._changed = False
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="reactor", daemon=True)
        holder.subscribe(self._on_change)

    def add(self, session: Session, connection: ControlConnection) -> None:
        """Serves another session until its worker says goodbye or is lost.

        Raises:
            ChannelClosedError: if the reactor is about to stop.
        """
        client = _Client(session, connection)
        with self._lock:
            if self._closing:
                raise ChannelClosedError("the run is over")
            self._clients.add(client)
            self._selector.register(connection.fileno(), selectors.EVENT_READ, client)
            if self._thread.ident is None:
                self._thread.start()
        self._wake()

    def close(self, timeout_s: float) -> None:
        """Waits up to ``timeout_s`` for the sessions to end, then stops serving."""
        with self._lock:
            self._closing = True
            started = self._thread.ident is not None
        self._wake()
        if started:
            self._thread.join(timeout_s)
        with self._lock:
            left = list(self._clients)
            self._clients.clear()
        self._wake()
        if started:
            self._thread.join(1.0)
        else:
            self._release()
        for client in left:
            client.connection.shutdown()
            client.connection.close()

    def _on_change(self) -> None:
        self._changed = True
        if self._held_back and threading.current_thread() is not self._thread:
            self._wake()

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except OSError:
            # Full: it is about to wake anyway. Closed: it has ended.
            return

    def _run(self) -> None:
        try:
            self._serve_all()
        except Exception as error:
            # Out of memory, for instance: workers would wait for answers for ever.
            self._on_failed(error)
        finally:
            self._release()

    def _serve_all(self) -> None:
        self._prepare_thread()
        while not (self._closing and not self._clients):
            ready = []
            for key, _ in self._selector.select():
                if key.data is None:
                    self._drain_wakes()
                else:
                    ready.append(key.data)
            if len(ready) > 1 and self._holder.joins_pushes:
                self._serve_joint(ready)
            else:
                for client in ready:
                    self._serve(client)
            self._resume()

    def _release(self) -> None:
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _drain_wakes(self) -> None:
        try:
            self._wake_out.recv(4096)
        except BlockingIOError:
            return

    def _serve_joint(self, clients: Sequence[_Client]) -> None:
        """Serves in this order, too, but pushes that follow each other at once."""
        waiting: dict[_Client, Arrived] = {}
        for client in clients:
            self._serve(client, waiting)
        self._finish_waiting(waiting)

    def _serve(self, client: _Client, waiting: dict[_Client, Arrived] | None = None) -> None:
        """Serves what a client has sent.

        Args:
            client: the client.
            waiting: pushes that are to be served together; None if each is served at once.
        """
        try:
            for message in client.connection.receive_available():
                joins = waiting is not None and isinstance(message, Push) and client not in waiting
                if waiting and not joins:
                    self._finish_waiting(waiting)
                    if client not in self._clients:
                        return
                if client.held_back is not None:
                    raise WireError(
                        f"worker {client.session.worker} sends {kind_of(message).name} before it was answered"
                    )
                if waiting is not None and isinstance(message, Push) and joins:
                    waiting[client] = client.session.arrive(message)
                else:
                    self._advance(client, client.session.serve(message))
        except Exception as error:
            if waiting:
                waiting.pop(client, None)
            self._end(client, error)
        else:
            if client.session.finished:
                self._end(client, None)

    def _finish_waiting(self, waiting: dict[_Client, Arrived]) -> None:
        pushes = [(client.session, arrived) for client, arrived in waiting.items()]
        client_of = {client.session: client for client in waiting}
        waiting.clear()
        try:
            answers = serve_together(self._holder, pushes)
        except Exception as error:
            # An update has failed in the middle; which of them it was cannot be told.
            for client in client_of.values():
                self._end(client, error)
            return
        for session, answer in answers:
            if isinstance(answer, EvictedError):
                self._end(client_of[session], answer)
            else:
                self._try_to_advance(client_of[session], answer)

    def _try_to_advance(self, client: _Client, request: Iterator[None]) -> None:
        try:
            self._advance(client, request)
        except Exception as error:
            self._end(client, error)

    def _advance(self, client: _Client, request: Iterator[None]) -> None:
        for _ in request:
            client.held_back = request
            self._held_back[client] = None
            return
        client.held_back = None
        self._held_back.pop(client, None)

    def _resume(self) -> None:
        # Each one that proceeds may let an earlier one proceed in turn.
        while self._changed and self._held_back:
            self._changed = False
            for client in list(self._held_back):
                assert client.held_back is not None
                self._try_to_advance(client, client.held_back)

    def _end(self, client: _Client, error: Exception | None) -> None:
        try:
            with self._lock:
                self._clients.discard(client)
                self._held_back.pop(client, None)
                self._selector.unregister(client.connection.fileno())
            self._on_ended(client.session, error)
        finally:
            client.connection.close()
