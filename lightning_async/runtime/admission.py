"""How a worker joins a run that is under way: it is told what the others know, and comes in between two meetings.

A worker that joins says so to rank 0 and gets a number to come back with (`Invitation`). Once it is ready to train it
asks for the state of the segment that is under way, takes it over, and asks to be let in. If that segment has ended
meanwhile it asks for the state of the next one: no meeting of the others waits for it while it gets ready.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError, say
from lightning_async.runtime.handshake import JOIN, Address, HandshakeError, PeerInfo, handshake
from lightning_async.runtime.meeting import receive_object, send_object
from lightning_async.runtime.roster import Roster
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Welcome

__all__ = ["Admission", "Admitted", "Invitation", "JoinRequest", "leave_invitation"]

log = logging.getLogger(__name__)

_VARIABLE = "LIGHTNING_ASYNC_JOIN"
# A lost rank may be started again before rank 0 has noticed that it is lost.
_NOTICE_TIMEOUT_S, _LOOK_S = 5.0, 0.02


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a process is started with that is to join a run.

    Args:
        address: where rank 0 listens.
        rank: the rank that it is to be; None for another one than those that there are.
    """

    address: Address
    rank: int | None

    def variables(self) -> dict[str, str]:
        """What stands for it in the environment of the process."""
        return {_VARIABLE: json.dumps({"address": json.loads(self.address.as_json()), "rank": self.rank})}

    @classmethod
    def of_this_process(cls) -> Invitation | None:
        """The invitation that this process was started with; None if it has none."""
        text = os.environ.get(_VARIABLE)
        if not text:
            return None
        found = json.loads(text)
        return cls(Address(**found["address"]), found["rank"])


def leave_invitation(address: Address, path: Path) -> None:
    """Leaves what other workers join a run with in a file that only its owner can read.

    Args:
        address: where rank 0 listens.
        path: of the file; replaced at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(address.as_json())
    os.replace(partial, path)


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a worker knows that was let in.

    Args:
        ranks: who is in the run.
        counts: how many meetings and sections there were.
    """

    ranks: tuple[int, ...]
    counts: tuple[int, int]


class Admission:
    """Rank 0's side.

    Args:
        roster: who is in the run.
        latch: the run's failure latch.
        counts: tells how many meetings and sections there were.

    Attributes:
        exchange: where the holder takes workers in, once the exchange is set up.
        expect: called with a rank whose connections are to be taken.
        let_in: called with a rank that is about to come to the holder.
        admit: called with a rank that is in the run from here on.
        check: called with a rank that has come in: takes it out again if it is gone already.
    """

    def __init__(self, roster: Roster, latch: FailureLatch, counts: Callable[[], tuple[int, int]]) -> None:
        self._roster = roster
        self._latch = latch
        self._counts = counts
        self.exchange: Address | None = None
        self.expect: Callable[[int], object] = lambda rank: None
        self.let_in: Callable[[int], object] = lambda rank: None
        self.admit: Callable[[int], object] = lambda rank: None
        self.check: Callable[[int], object] = lambda rank: None
        self._changed = threading.Condition()
        self._segment = 0
        self._state: bytes | None = None
        self._closed = False

    def open(self, state: bytes) -> None:
        """A segment is under way; workers may come in until `shut`.

        Args:
            state: what the ranks know that train in it.
        """
        with self._changed:
            self._segment += 1
            self._state = state
            self._changed.notify_all()

    def shut(self) -> None:
        """The ranks are about to meet: nobody comes in."""
        with self._changed:
            self._state = None

    def close(self) -> None:
        """Nobody comes in any more; idempotent."""
        with self._changed:
            self._state, self._closed = None, True
            self._changed.notify_all()

    def take(self, peer: PeerInfo, connection: ControlConnection) -> None:
        """Serves a worker that wants to join, in the listener's thread for it, until it is in or gone.

        Raises:
            HandshakeError: if it cannot join.
        """
        rank, incarnation = self._number(peer)
        address = self.exchange
        if address is None:
            raise HandshakeError("the run has not begun to train; try again in a moment")
        self.expect(rank)
        self.let_in(rank)
        # The token is the run's, which it has.
        told = json.loads(address.without_token().as_json())
        offer = {"rank": rank, "incarnation": incarnation, "exchange": told}
        connection.send(Welcome(rank, json.dumps(offer)))
        connection.settimeout(None)
        try:
            while True:
                kind, segment = receive_object(connection)
                if kind == "state":
                    send_object(connection, self._wait_for_state())
                elif (admitted := self._try_to_admit(rank, incarnation, segment)) is None:
                    send_object(connection, None)
                else:
                    # Its heartbeat may have ended when it was no loss yet.
                    self.check(rank)
                    say(0, f"rank {rank} has joined; {len(admitted.ranks)} ranks train")
                    send_object(connection, admitted)
                    return
        except ChannelClosedError as error:
            log.debug("rank %d, which was about to join, is gone: %s", rank, error)
        finally:
            connection.close()

    def _number(self, peer: PeerInfo) -> tuple[int, int]:
        with self._changed:
            asked = peer.claims.get("joins_as")
            if asked is None:
                return self._roster.next_rank()
            if not isinstance(asked, int) or asked < 1:
                raise HandshakeError(f"it wants to join as rank {asked!r}")
            noticed_by = time.monotonic() + _NOTICE_TIMEOUT_S
            while asked in self._roster and not self._closed and time.monotonic() < noticed_by:
                self._changed.wait(_LOOK_S)
            if asked in self._roster:
                raise HandshakeError(f"rank {asked} is in the run")
            return asked, self._roster.next_incarnation(asked)

    def _wait_for_state(self) -> tuple[int, bytes] | None:
        """The segment under way and its state, once there is one; None if there will be none."""
        with self._changed:
            while self._state is None and not self._closed and self._latch.failure is None:
                self._changed.wait(0.5)
            return None if self._state is None else (self._segment, self._state)

    def _try_to_admit(self, rank: int, incarnation: int, segment: int) -> Admitted | None:
        """What a worker is told that is in from here on; None if its segment has ended.

        Raises:
            ChannelClosedError: if another worker has come for that rank since.
        """
        with self._changed:
            if rank in self._roster or not self._roster.is_latest(rank, incarnation):
                raise ChannelClosedError("another worker has come for that rank since")
            if self._state is None or segment != self._segment or self._latch.failure is not None:
                return None
            # Until `shut` returns the ranks have not begun to meet, and from then on they wait for it.
            self.admit(rank)
            self._roster.add(rank)
            return Admitted(self._roster.living, self._counts())


class JoinRequest:
    """The side of a worker that joins.

    Args:
        invitation: what it was started with.
        latch: the run's failure latch.
        claims: what else rank 0 is to know of it.

    Attributes:
        rank: the rank that it is.
        incarnation: how many workers of this rank came before.
        exchange: where the holder takes workers in.

    Raises:
        HandshakeError: if rank 0 refuses, with its reason.
        ChannelClosedError: if rank 0 cannot be reached.
    """

    def __init__(self, invitation: Invitation, latch: FailureLatch, **claims: Any) -> None:
        self.address = invitation.address
        self._latch = latch
        self._connection, offer = handshake(
            invitation.address, invitation.rank or 1, JOIN, joins_as=invitation.rank, **claims
        )
        found = json.loads(offer)
        self.rank: int = found["rank"]
        self.incarnation: int = found["incarnation"]
        self.exchange = replace(Address(**found["exchange"]), token=invitation.address.token)

    def fetch_state(self) -> tuple[int, bytes] | None:
        """The segment under way and what the ranks know that train in it; waits for one. None if the run is over."""
        state: tuple[int, bytes] | None = self._ask("state", 0)
        return state

    def come_in(self, segment: int) -> Admitted | None:
        """Takes part from here on; None if the segment has ended."""
        admitted: Admitted | None = self._ask("come in", segment)
        if admitted is not None:
            self._connection.close()
        return admitted

    def close(self) -> None:
        """Gives up; idempotent."""
        self._connection.close()

    def _ask(self, kind: str, segment: int) -> Any:
        self._latch.check()
        try:
            send_object(self._connection, (kind, segment))
            return receive_object(self._connection)
        except ChannelClosedError as error:
            reason = f"the run has ended while this rank was about to join: {error}"
            raise WorkerFailedError(self._latch.explain_loss(lambda: RunFailure(0, reason))) from error
