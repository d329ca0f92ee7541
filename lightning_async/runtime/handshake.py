"""How a connection to rank 0 begins: a HELLO that says which rank connects and what for, and rank 0's answer.

A connection is a heartbeat, a worker's control channel, or asks for an optimizer's state.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from lightning_async.transport.connection import ControlConnection, connect
from lightning_async.transport.message import Hello, Refuse, Welcome, kind_of

__all__ = [
    "CONTROL",
    "HANDSHAKE_TIMEOUT_S",
    "HEARTBEAT",
    "STATE",
    "Address",
    "HandshakeError",
    "PeerInfo",
    "handshake",
]

HEARTBEAT, CONTROL, STATE = "heartbeat", "control", "state"

# How long either side waits for the other's next word.
HANDSHAKE_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 30.0
# Before rank 0 welcomes a control channel it reserves the worker's buffers, a second or so for each GB, and may have to
# wait for a name server. That it is gone is noticed at once, and that it is stopped by the heartbeat.
_WELCOME_TIMEOUT_S = 600.0


class HandshakeError(RuntimeError):
    """A connection was refused; the message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the workers find rank 0, and the secret that proves they belong to this run.

    Args:
        host: name or address of rank 0's host.
        port: of its listener.
        token: the secret.
        timeout_s: `worker_timeout`: how long either side waits for a sign of the other's life.
    """

    host: str
    port: int
    token: str
    timeout_s: float = 60.0

    def as_json(self) -> str:
        """For the broadcast to the workers."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Address:
        """Inverse of `as_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Who stands at the listener: a rank of this run, how often it has come, and what it says of itself."""

    rank: int
    incarnation: int
    claims: dict[str, Any]

    @property
    def slot(self) -> int:
        """Which of the rank's slots a control channel is for; -1 if what it says is no number."""
        slot = self.claims.get("slot", 0)
        return slot if type(slot) is int else -1

    @property
    def overlaps(self) -> bool:
        """Whether the rank computes while its answer is under way."""
        return self.claims.get("overlaps") is True


def handshake(
    address: Address, rank: int, role: str, incarnation: int = 0, **claims: Any
) -> tuple[ControlConnection, str]:
    """Connects to rank 0's listener and says who is there.

    Args:
        address: from `Listener.address`.
        rank: this rank.
        role: `HEARTBEAT`, `CONTROL` or `STATE`.
        incarnation: how many workers of this rank came before.
        claims: what else rank 0 should know, JSON values.

    Returns:
        The connection and what the welcome offers.

    Raises:
        HandshakeError: if rank 0 refuses, with its reason.
        ChannelClosedError: if rank 0 cannot be reached.
    """
    connection = connect(address.host, address.port, _CONNECT_TIMEOUT_S)
    connection.settimeout(HANDSHAKE_TIMEOUT_S)
    claims_text = json.dumps({"token": address.token, "role": role, **claims})
    connection.send(Hello(rank, incarnation, claims_text))
    if role != HEARTBEAT:
        connection.settimeout(_WELCOME_TIMEOUT_S)
    reply = connection.receive()
    if not isinstance(reply, Welcome):
        connection.close()
        reason = reply.reason if isinstance(reply, Refuse) else f"it answers with {kind_of(reply).name}"
        raise HandshakeError(f"rank 0 refused rank {rank}: {reason}")
    connection.settimeout(None)
    return connection, reply.offer
