"""What worker and holder say to each other: one small class for each kind of message.

`codec.py` turns messages into bytes and back. A payload of tensor data travels elsewhere, behind its message, and its
size here is a claim: the receiver compares it with the session's own size before it takes the payload.

The classes are tuples, which are made in a fraction of the time that frozen dataclasses take, and there are two for
each update. So messages of two kinds with the same values compare equal: ask for the type.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, TypeAlias

import torch

__all__ = [
    "Abort",
    "Ack",
    "Beat",
    "Challenge",
    "Close",
    "Draw",
    "Evict",
    "Goodbye",
    "Hello",
    "Kind",
    "Leave",
    "Message",
    "Outcome",
    "Parameters",
    "Part",
    "Proof",
    "Pull",
    "Push",
    "Read",
    "Refuse",
    "Release",
    "Skip",
    "Tickets",
    "Welcome",
    "kind_of",
]


class Kind(enum.IntEnum):
    """The kinds of messages. The numbers are the protocol; they are never given a new meaning."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    DRAW = 4
    TICKETS = 5
    PULL = 6
    PARAMETERS = 7
    PUSH = 8
    SKIP = 9
    LEAVE = 10
    CLOSE = 11
    ACK = 12
    BEAT = 13
    ABORT = 14
    GOODBYE = 15
    READ = 16
    RELEASE = 17
    CHALLENGE = 18
    PROOF = 19
    EVICT = 20
    PART = 21


class Outcome(enum.IntEnum):
    """What became of the push that parameters are the answer to."""

    NOT_PUSHED = 0
    APPLIED = 1
    DROPPED = 2
    REJECTED = 3


class Hello(NamedTuple):
    """The first message of a connection: who connects.

    Args:
        worker: the rank.
        incarnation: how many workers of this rank came before.
        claims: what else it says of itself, as JSON.
    """

    worker: int
    incarnation: int = 0
    claims: str = ""


class Challenge(NamedTuple):
    """Answers `Hello`: proves that rank 0 has the run's token, and asks for the same proof.

    Args:
        worker: the rank that has come.
        text: see `handshake.py`.
    """

    worker: int
    text: str = ""


class Proof(NamedTuple):
    """Answers `Challenge`.

    Args:
        worker: the rank that has come.
        text: see `handshake.py`.
    """

    worker: int
    text: str = ""


class Welcome(NamedTuple):
    """The connection is taken.

    Args:
        worker: the rank that is welcome.
        offer: what rank 0 offers to it, as JSON.
    """

    worker: int = 0
    offer: str = ""


class Refuse(NamedTuple):
    """A connection, an offer or a request is refused.

    Args:
        worker: the rank that it comes from or goes to.
        reason: why.
    """

    worker: int = 0
    reason: str = ""


class Draw(NamedTuple):
    """Asks for the next tickets; answered with `Tickets`."""

    worker: int


class Tickets(NamedTuple):
    """Hands out tickets.

    Args:
        worker: the rank that may compute them.
        tickets: empty if the rank's segment is over.
    """

    worker: int
    tickets: range = range(0)


class Pull(NamedTuple):
    """Asks for parameters to compute a gradient at; answered with `Parameters` once the barrier lets the worker read.

    Args:
        worker: the rank that asks.
        counts: what it has counted since its last report (see `tally.py`), as `pack_counts` packs it.
    """

    worker: int
    counts: bytes = b""


class Parameters(NamedTuple):
    """Announces the holder's parameters; answers `Pull`, `Push` and `Read`.

    Args:
        worker: the rank that they go to.
        version: of the parameters.
        outcome: what became of the push.
        tickets: the tickets that the push has asked for; empty if there are none, or if it has not asked.
        dtype: element type of the payload.
        payload_bytes: size of the payload.
        counts: the sums over all workers, if the request had counts.
    """

    worker: int
    version: int = 0
    outcome: Outcome = Outcome.NOT_PUSHED
    tickets: range = range(0)
    dtype: torch.dtype | None = None
    payload_bytes: int = 0
    counts: bytes = b""


class Push(NamedTuple):
    """Announces a gradient; answered with `Parameters`.

    Args:
        worker: the rank that has computed it.
        optimizer: index of the optimizer that owns the parameters.
        version: the version that the gradient was computed at.
        tickets: the tickets of the batches that it covers.
        samples: number of samples in them.
        waited_s: seconds that the worker's last round trip took.
        wants_tickets: whether the answer is to bring the next tickets.
        dtype: element type of the payload.
        payload_bytes: size of the payload.
        hyperparams: the present hyperparameters of all param groups, as `pack_hyperparams` packs them.
        present: bitmap with one bit per parameter of the optimizer, least significant bit first.
        counts: what the worker has counted since its last report (see `tally.py`), as `pack_counts` packs it.
        finite: False if the worker has found NaN or infinity in the gradient, which is then rejected.
    """

    worker: int
    optimizer: int = 0
    version: int = 0
    tickets: tuple[range, ...] = ()
    samples: int = 0
    waited_s: float = 0.0
    wants_tickets: bool = False
    dtype: torch.dtype | None = None
    payload_bytes: int = 0
    hyperparams: bytes = b""
    present: bytes = b""
    counts: bytes = b""
    finite: bool = True


class Skip(NamedTuple):
    """Reports batches that gave no gradient; acknowledged.

    Args:
        worker: the rank that has computed them.
        tickets: their tickets.
        counts: what the worker has counted since its last report (see `tally.py`), as `pack_counts` packs it.
    """

    worker: int
    tickets: tuple[range, ...] = ()
    counts: bytes = b""


class Release(NamedTuple):
    """Gives back tickets that there are no batches for; acknowledged.

    Args:
        worker: the rank that held them.
        tickets: the tickets.
        stream_over: whether the rank's own stream has ended, so that it draws nothing more in this epoch.
    """

    worker: int
    tickets: tuple[range, ...] = ()
    stream_over: bool = False


class Leave(NamedTuple):
    """Gives back parameters that nothing will be pushed for; acknowledged."""

    worker: int


class Close(NamedTuple):
    """Ends the segment for every rank; acknowledged."""

    worker: int


class Read(NamedTuple):
    """Asks for parameters past the barrier, for the synchronous phase; answered with `Parameters`.

    Args:
        worker: the rank that asks.
        counts: what it has counted since its last report (see `tally.py`), as `pack_counts` packs it.
    """

    worker: int
    counts: bytes = b""


class Ack(NamedTuple):
    """It is done, or the offer is taken.

    Args:
        worker: the rank that it comes from or goes to.
        takes_shortcut: whether the worker goes on over the Unix socket that it was offered.
    """

    worker: int = 0
    takes_shortcut: bool = False


class Beat(NamedTuple):
    """A sign of life.

    Args:
        worker: the rank that gives it.
        waits_in: the collective that the rank waits in for too long, if any (see `collective_watch.py`).
    """

    worker: int
    waits_in: str = ""


class Abort(NamedTuple):
    """The run has failed.

    Args:
        worker: the rank at fault.
        reason: what happened to it.
    """

    worker: int
    reason: str = ""


class Evict(NamedTuple):
    """A rank was taken out of the run, which goes on without it.

    Args:
        worker: the rank.
        reason: what happened to it.
    """

    worker: int
    reason: str = ""


class Part(NamedTuple):
    """Announces a part of a gradient or of the parameters, between a worker and one of the holder's shards.

    Args:
        worker: the rank whose gradient it is, or that the parameters go to.
        number: of a gradient which of the worker's pushes it belongs to, from 1; of parameters their version.
        dtype: element type of the payload.
        payload_bytes: size of the payload.
    """

    worker: int
    number: int = 0
    dtype: torch.dtype | None = None
    payload_bytes: int = 0


class Goodbye(NamedTuple):
    """The connection ends in order; not answered."""

    worker: int


Message: TypeAlias = (
    Hello
    | Challenge
    | Proof
    | Welcome
    | Refuse
    | Draw
    | Tickets
    | Pull
    | Parameters
    | Push
    | Skip
    | Release
    | Leave
    | Close
    | Read
    | Ack
    | Beat
    | Abort
    | Evict
    | Part
    | Goodbye
)

_KINDS: dict[type, Kind] = {
    kind: Kind[kind.__name__.upper()]
    for kind in (
        *(Hello, Challenge, Proof, Welcome, Refuse, Draw, Tickets, Pull, Parameters, Push, Skip),
        *(Release, Leave, Close, Read, Ack, Beat, Abort, Evict, Part, Goodbye),
    )
}


def kind_of(message: Message | type[Message]) -> Kind:
    """The kind of a message, or of a class of messages.

    Examples:
        >>> kind_of(Draw(worker=3)).name, kind_of(Draw).name
        ('DRAW', 'DRAW')
    """
    return _KINDS[message if isinstance(message, type) else type(message)]
