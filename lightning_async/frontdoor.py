"""Rank 0's front door: one listening socket; lets the run's own ranks in and refuses everyone else by name.

A connection begins with HELLO: a rank, the run's token, and whether it is a lifeline (watched by `lifeline.py`), a
doorbell (served by `server.py`) or asks for an optimizer's state (`state_transfer.py`). Knows no Lightning.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_async.fields import fit_text
from lightning_async.lifeline import Lifelines
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.control import ControlConnection, connect
from lightning_async.wire import Kind, Message, WireError

__all__ = ["DOORBELL", "LIFELINE", "STATE", "Address", "FrontDoor", "HandshakeError", "Visitor", "introduce"]

log = logging.getLogger(__name__)

LIFELINE, DOORBELL, STATE = "lifeline", "doorbell", "state"
_HANDSHAKE_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 30.0
# Before rank 0 welcomes a doorbell it reserves the worker's buffers, a second or so for each GB, and may have to wait
# for a name server. That it is gone is noticed at once, and that it is stopped by the lifeline.
_WELCOME_TIMEOUT_S = 600.0


class HandshakeError(RuntimeError):
    """A connection was refused; the message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the workers find rank 0, and the secret that proves they belong to this run."""

    host: str
    port: int
    token: str

    def as_json(self) -> str:
        """For the broadcast to the workers."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Address:
        """Inverse of `as_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who stands at the door: a rank of this run, how often it has come, and what it says of itself."""

    rank: int
    incarnation: int
    claims: dict[str, Any]

    @property
    def lane(self) -> int:
        """Which of the rank's lanes a doorbell is for."""
        return int(self.claims.get("lane", 0) == 1)

    @property
    def overlaps(self) -> bool:
        """Whether the rank computes while its answer is under way."""
        return self.claims.get("overlaps") is True


class FrontDoor:
    """Accepts connections until closed; a short-lived thread per visitor.

    Args:
        host: the address that the workers reach rank 0 at; the loopback address keeps the door shut to other hosts.
        workers: number of ranks.
        lifelines: takes the lifelines.
    """

    def __init__(self, host: str, workers: int, lifelines: Lifelines) -> None:
        self._workers = workers
        self._lifelines = lifelines
        self._closing = threading.Event()
        # Served while training; before and after, a doorbell finds nobody.
        self.on_doorbell: Callable[[Visitor, ControlConnection], None] | None = None
        # Served while training, too, in the visitor's own thread: answers one question.
        self.on_state: Callable[[Visitor, ControlConnection], None] | None = None
        self.on_refused: Callable[[], None] = lambda: None
        # Whether rank 0's own worker comes in here too, as where its training and the updates overlap.
        self.rank_0_rings = False
        self._listener = socket.create_server(("127.0.0.1" if host == "127.0.0.1" else "", 0), backlog=256)
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_hex(16))
        self._thread = threading.Thread(target=self._accept, name="front-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets nobody in any more; idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        # A thread in accept() does not notice that its socket was closed; a connection wakes it.
        try:
            socket.create_connection(("127.0.0.1", self.address.port), timeout=1.0).close()
        except OSError as error:
            log.debug("the door was already shut: %s", error)
        self._thread.join(timeout=1.0)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                log.debug("the door is shut: %s", error)
                return
            if self._closing.is_set():
                sock.close()
                return
            connection = ControlConnection(sock)
            # A thread each: somebody who connects and says nothing must not keep the others out.
            threading.Thread(target=self._welcome, args=(connection,), name="visitor", daemon=True).start()

    def _welcome(self, connection: ControlConnection) -> None:
        peer = connection.peer
        try:
            connection.settimeout(_HANDSHAKE_TIMEOUT_S)
            visitor, role = self._identify(connection.receive())
            if role == LIFELINE:
                if self._lifelines.watches(visitor.rank):
                    raise HandshakeError(f"rank {visitor.rank} is here already")
                connection.send(Message(Kind.WELCOME, worker=visitor.rank))
                self._lifelines.add(visitor.rank, connection)
                return
            answer = self.on_doorbell if role == DOORBELL else self.on_state
            if answer is None:
                raise HandshakeError("no training is under way")
            answer(visitor, connection)
        except (WireError, ChannelClosedError, HandshakeError) as error:
            if self._closing.is_set():
                connection.close()
                return
            # The reason may quote what the stranger sent.
            reason = fit_text(str(error))
            log.warning("lightning_async refused a connection from %s: %s", peer, reason)
            self.on_refused()
            self._turn_away(connection, reason)

    def _turn_away(self, connection: ControlConnection, reason: str) -> None:
        try:
            connection.send(Message(Kind.REFUSE, text=reason))
        except ChannelClosedError as error:
            log.debug("could not tell it: %s", error)
        connection.close()

    def _identify(self, hello: Message) -> tuple[Visitor, str]:
        if hello.kind is not Kind.HELLO:
            raise HandshakeError(f"it begins with {hello.kind.name} instead of HELLO")
        try:
            claims = json.loads(hello.text)
            token, role = str(claims["token"]).encode(), str(claims["role"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise HandshakeError(f"its HELLO cannot be read: {error!r}") from error
        if not hmac.compare_digest(token, self.address.token.encode()):
            raise HandshakeError("it does not know this run's token")
        first = 0 if role == DOORBELL and self.rank_0_rings else 1
        if role not in (LIFELINE, DOORBELL, STATE) or not first <= hello.worker < self._workers:
            raise HandshakeError(f"there is no {role!r} for rank {hello.worker} among {self._workers} ranks")
        return Visitor(hello.worker, hello.incarnation, claims), role


def introduce(
    address: Address, rank: int, role: str, incarnation: int = 0, **claims: Any
) -> tuple[ControlConnection, str]:
    """Connects to rank 0's front door and says who is there.

    Args:
        address: from `FrontDoor.address`.
        rank: this rank.
        role: `LIFELINE`, `DOORBELL` or `STATE`.
        incarnation: how many workers of this rank came before.
        claims: what else rank 0 should know, JSON values.

    Returns:
        The connection and the text of the welcome.

    Raises:
        HandshakeError: if rank 0 refuses, with its reason.
        ChannelClosedError: if rank 0 cannot be reached.
    """
    connection = connect(address.host, address.port, _CONNECT_TIMEOUT_S)
    connection.settimeout(_HANDSHAKE_TIMEOUT_S)
    text = json.dumps({"token": address.token, "role": role, **claims})
    connection.send(Message(Kind.HELLO, worker=rank, incarnation=incarnation, text=text))
    if role != LIFELINE:
        connection.settimeout(_WELCOME_TIMEOUT_S)
    reply = connection.receive()
    if reply.kind is not Kind.WELCOME:
        connection.close()
        raise HandshakeError(f"rank 0 refused rank {rank}: {reply.text}")
    connection.settimeout(None)
    return connection, reply.text
