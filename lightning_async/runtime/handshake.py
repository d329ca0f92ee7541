"""How a connection to rank 0 begins: a HELLO that says which rank connects and what for, and rank 0's answer.

A connection is a heartbeat, a worker's control channel, asks for an optimizer's state, is for meetings, or is of a rank
that asks to join, or of what has started the ranks of a host. Both sides prove that they have the run's token, and
neither says it:

| who | says | with |
|---|---|---|
| rank | HELLO | rank, incarnation, role, a random number |
| rank 0 | CHALLENGE | a random number of its own, and a proof: a digest of all that was said, keyed with the token |
| rank | PROOF | the same, and what else it says of itself |
| rank 0 | WELCOME or REFUSE | |

Each proof covers both random numbers, so what was recorded of one handshake is worth nothing in another.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection, connect, join_host_port
from lightning_async.transport.message import Challenge, Hello, Message, Proof, Refuse, Welcome, kind_of

__all__ = [
    "CONTROL",
    "HANDSHAKE_TIMEOUT_S",
    "HEARTBEAT",
    "JOIN",
    "LAUNCHER",
    "MEETING",
    "SEQUENCER",
    "STATE",
    "Address",
    "HandshakeError",
    "Introduction",
    "PeerInfo",
    "handshake",
]

HEARTBEAT, CONTROL, STATE, MEETING, JOIN = "heartbeat", "control", "state", "meeting", "join"
LAUNCHER = "launcher"
# To a shard of the holder, of the first one, which gives every gradient its place.
SEQUENCER = "sequencer"

# How long a stranger may take until it has proven that it is none, and how long a rank tries at least.
HANDSHAKE_TIMEOUT_S = 10.0
_LEAST_PATIENCE_S = 30.0
# Between two tries of a rank whose connection was closed without a word, as where strangers flood rank 0.
_PAUSE_S = 0.2
_NONCE_BYTES = 16
_PROOF_CHARACTERS = 64
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
        """All of it; the token must not go over a network."""
        return json.dumps(asdict(self))

    def without_token(self) -> Address:
        """What may be said in public."""
        return replace(self, token="")

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


class Introduction:
    """Rank 0's side of one handshake, without its I/O.

    Args:
        token: the run's.

    Examples:
        >>> rank, rank_0 = _Newcomer("token", 1, HEARTBEAT, 0), Introduction("token")
        >>> challenge = rank_0.hear(rank.hello)
        >>> rank_0.hear(rank.answer(challenge, {})).rank, rank_0.role
        (1, 'heartbeat')
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._hello: Hello | None = None
        self._said = ""
        self.role = ""

    def hear(self, message: Message) -> Challenge | PeerInfo:
        """Takes the other side's next message.

        Returns:
            What to answer; or who it is, once it has proven to belong to this run.

        Raises:
            HandshakeError: if it does not belong to this run.
        """
        if self._hello is None:
            if not isinstance(message, Hello):
                raise HandshakeError(f"it begins with {kind_of(message).name} instead of HELLO")
            claims = _read_json(message.claims, "HELLO")
            self.role = str(claims.get("role"))
            self._hello, nonce = message, secrets.token_hex(_NONCE_BYTES)
            self._said = f"{_spoken(message)} {nonce}"
            return Challenge(message.worker, nonce + _prove(self._token, "rank 0", self._said))
        if not isinstance(message, Proof):
            raise HandshakeError(f"it answers the challenge with {kind_of(message).name}")
        proof, text = message.text[:_PROOF_CHARACTERS], message.text[_PROOF_CHARACTERS:]
        expected = _prove(self._token, "rank", f"{self._said} {text}")
        if not hmac.compare_digest(proof.encode(), expected.encode()):
            raise HandshakeError("it does not know this run's token")
        return PeerInfo(self._hello.worker, self._hello.incarnation, _read_json(text, "PROOF"))


class _Newcomer:
    """A rank's side of one handshake, without its I/O."""

    def __init__(self, token: str, rank: int, role: str, incarnation: int) -> None:
        self._token = token
        self.role = role
        self.hello = Hello(rank, incarnation, json.dumps({"role": role, "nonce": secrets.token_hex(_NONCE_BYTES)}))

    def answer(self, challenge: Challenge, claims: dict[str, Any]) -> Proof:
        """Answers rank 0, once it has proven to be rank 0.

        Raises:
            HandshakeError: if it has not.
        """
        nonce, proof = challenge.text[: 2 * _NONCE_BYTES], challenge.text[2 * _NONCE_BYTES :]
        said = f"{_spoken(self.hello)} {nonce}"
        if not hmac.compare_digest(proof.encode(), _prove(self._token, "rank 0", said).encode()):
            raise HandshakeError("it does not know this run's token")
        text = json.dumps(claims)
        return Proof(self.hello.worker, _prove(self._token, "rank", f"{said} {text}") + text)


def handshake(
    address: Address, rank: int, role: str, incarnation: int = 0, patience_s: float | None = None, **claims: Any
) -> tuple[ControlConnection, str]:
    """Connects to rank 0's listener and says who is there.

    Args:
        address: of rank 0's listener.
        rank: this rank.
        role: `HEARTBEAT`, `CONTROL`, `STATE`, `MEETING`, `JOIN`, `LAUNCHER` or `SEQUENCER`.
        incarnation: how many workers of this rank came before.
        patience_s: how many seconds to try; None for as long as the run waits for a sign of life.
        claims: what else rank 0 should know, JSON values.

    Returns:
        The connection and what the welcome offers.

    Raises:
        HandshakeError: if rank 0 refuses, with its reason, or if it is not rank 0 who answers.
        ChannelClosedError: if rank 0 cannot be reached.
    """
    patience_s = max(address.timeout_s, _LEAST_PATIENCE_S) if patience_s is None else patience_s
    deadline = time.monotonic() + patience_s
    newcomer = _Newcomer(address.token, rank, role, incarnation)
    while True:
        connection = connect(address.host, address.port, _left_s(deadline))
        try:
            offer = _introduce(connection, newcomer, address, claims, deadline)
        except ChannelClosedError:
            connection.close()
            if time.monotonic() + _PAUSE_S > deadline:
                raise
            time.sleep(_PAUSE_S)
        except BaseException:
            connection.close()
            raise
        else:
            connection.settimeout(None)
            return connection, offer


def _introduce(
    connection: ControlConnection, newcomer: _Newcomer, address: Address, claims: dict[str, Any], deadline: float
) -> str:
    """Proves that this rank belongs to the run; returns what the welcome offers."""
    rank = newcomer.hello.worker
    connection.settimeout(_left_s(deadline))
    connection.send(newcomer.hello)
    challenge = _or_refused(connection.receive(), Challenge, rank)
    try:
        proof = newcomer.answer(challenge, claims)
    except HandshakeError as error:
        where = join_host_port(address.host, address.port)
        raise HandshakeError(f"what answers rank {rank} at {where} is not rank 0 of this run: {error}") from None
    connection.send(proof)
    connection.settimeout(_left_s(deadline) if newcomer.role == HEARTBEAT else _WELCOME_TIMEOUT_S)
    return _or_refused(connection.receive(), Welcome, rank).offer


def _left_s(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


_M = TypeVar("_M", Challenge, Welcome)


def _or_refused(reply: Message, expected: type[_M], rank: int) -> _M:
    if isinstance(reply, expected):
        return reply
    reason = reply.reason if isinstance(reply, Refuse) else f"it answers with {kind_of(reply).name}"
    raise HandshakeError(f"rank 0 refused rank {rank}: {reason}")


def _spoken(hello: Hello) -> str:
    return f"{hello.worker} {hello.incarnation} {hello.claims}"


def _prove(token: str, who: str, said: str) -> str:
    # Who is part of it, so that nobody can answer rank 0 with what rank 0 has said itself.
    return hmac.digest(token.encode(), f"{who} {said}".encode(), "sha256").hex()


def _read_json(text: str, kind: str) -> dict[str, Any]:
    try:
        claims = json.loads(text)
        if not isinstance(claims, dict):
            raise TypeError(f"a {type(claims).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise HandshakeError(f"its {kind} cannot be read: {error!r}") from error
    return claims
