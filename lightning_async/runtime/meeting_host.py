"""Rank 0's side of a meeting: it alone decides what the result is, and who took part; see `meeting.py`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, TypeVar

from typing_extensions import override

from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.runtime.handshake import HandshakeError, PeerInfo
from lightning_async.runtime.meeting import END, LOOK_S, Meeting, Place, RanksLostError, receive_object, send_object
from lightning_async.runtime.process_identity import ProcessIdentity
from lightning_async.runtime.roster import Roster
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Welcome

__all__ = ["MeetingHost"]

_T = TypeVar("_T")

_IN_VAIN = (
    "a part of the run that all ranks make together, such as a validation, could not be finished twice in a row, "
    "though no rank was lost meanwhile: a process group of the ranks does not work, or a hook runs a collective on "
    "some of them"
)


class MeetingHost(Meeting):
    """Rank 0's side.

    Args:
        roster: who is in the run.
        latch: the run's failure latch.
        on_lost: told which rank's connection was lost, and how; returns once the rank is out of the roster, or the run
            has failed.
        host: the address that the others reach rank 0 at, once it listens.
    """

    is_host = True

    def __init__(
        self, roster: Roster, latch: FailureLatch, on_lost: Callable[[int, str], None], host: str = ""
    ) -> None:
        super().__init__(roster.living, host)
        self._roster = roster
        self._latch = latch
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._connections: dict[int, ControlConnection] = {}
        self._processes: dict[int, ProcessIdentity | None] = {}
        # Of ranks that were lost; closed by the thread that meets.
        self._retired: list[ControlConnection] = []
        # What ranks have brought that are further than this one.
        self._early: dict[int, tuple[Place, Any]] = {}
        self._broken = False
        # Of the section under way: the generation that its attempt has begun with, how many attempts in a row were
        # given up though no rank was lost, and where a rank was last that was elsewhere than this one.
        self._began_with = self._in_vain = 0
        self._unlike: RunFailure | None = None
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)

    def add(self, rank: int, connection: ControlConnection, process: ProcessIdentity | None = None) -> None:
        """Meets another rank.

        Args:
            rank: the rank.
            connection: to it; owned from here on.
            process: which one it is, if that is known.
        """
        with self._lock:
            self._processes[rank] = process
            before = self._connections.pop(rank, None)
            self._connections[rank] = connection
            self._early.pop(rank, None)
        if before is not None:
            before.close()
        self._wake()

    def take(self, peer: PeerInfo, connection: ControlConnection) -> None:
        """Welcomes a rank of the run at the listener.

        Raises:
            HandshakeError: if it is not in the run.
        """
        if peer.rank not in self._roster:
            raise HandshakeError(f"rank {peer.rank} was taken out of the run")
        connection.send(Welcome(peer.rank))
        connection.settimeout(None)
        self.add(peer.rank, connection, ProcessIdentity.from_claims(peer.claims))

    def note_lost(self, rank: int, ends: bool = False) -> None:
        """Notes that a rank is out of the roster: nobody waits for it any more, and its process ends if it is here.

        Args:
            rank: the rank.
            ends: whether it ends by itself.
        """
        with self._lock:
            process = self._processes.pop(rank, None)
            connection = self._connections.pop(rank, None)
            if connection is not None:
                self._retired.append(connection)
            self._early.pop(rank, None)
            self._broken = True
        if connection is not None:
            # Wakes the thread that is in the middle of a message from there, and has it still in hand.
            connection.shutdown()
        if process is not None and not ends:
            # It may only be stopped, and would come to life when another one has its place.
            process.kill()
        self._wake()

    @override
    def gather(self, mine: _T, name: str) -> list[_T]:
        arrived = self._meet(self._next(name), mine)
        gathered: list[_T] = [arrived[rank] for rank in self.ranks]
        self._answer(arrived, gathered)
        return gathered

    @override
    def _end_section(self, intact: bool) -> bool:
        arrived = self._meet(self._end_place(), intact)
        with self._lock:
            whole, self._broken = all(arrived.values()) and not self._broken, False
        self._note_repetition(whole)
        self._answer(arrived, whole)
        return whole

    def _note_repetition(self, whole: bool) -> None:
        """Ends the run if sections are repeated for another reason than the loss of a rank, which does not go away."""
        in_vain = not whole and self.generation == self._began_with
        self._in_vain = self._in_vain + 1 if in_vain else 0
        self._began_with, unlike, self._unlike = self.generation, self._unlike, None
        # The news of a loss may come when the attempt that it has broken off is over already.
        if self._in_vain > 1:
            self._latch.trip(unlike or RunFailure(0, _IN_VAIN))
            self._latch.check()

    @override
    def repeat_until_whole(
        self, body: Callable[[], None], restore: Callable[[], None], was_lost: Callable[[Exception], bool]
    ) -> None:
        with self._lock:
            # One that was lost since the last meeting has no part in what the others begin with here.
            self._broken = self._roster.generation != self.generation
        self._began_with, self._in_vain, self._unlike = self.generation, 0, None
        super().repeat_until_whole(body, restore, was_lost)

    @override
    def close(self) -> None:
        with self._lock:
            connections = [*self._connections.values(), *self._retired]
            self._connections.clear()
            self._retired.clear()
        for connection in connections:
            connection.close()
        self._wake_in.close()
        self._wake_out.close()

    def _meet(self, place: Place, mine: Any) -> dict[int, Any]:
        """Waits for every rank in the run; returns what each has brought."""
        arrived: dict[int, Any] = {0: mine}
        with self._lock:
            retired, self._retired = self._retired, []
        for connection in retired:
            connection.close()
        while missing := [rank for rank in self._roster.living if rank not in arrived]:
            self._latch.check()
            if self._is_to_be_repeated(place):
                self._send_back(arrived)
                raise RanksLostError("a rank was lost")
            for rank in self._ready(missing):
                came = self._receive(rank)
                if came is None:
                    continue
                theirs, value = came
                if theirs == place:
                    arrived[rank] = value
                elif self._is_further(theirs, place):
                    # It has come to the section's end because it could not go on.
                    self._unlike = _mismatch(rank, theirs, place)
                    with self._lock:
                        self._early[rank] = came
                        self._broken = True
                elif self._is_behind(theirs, place):
                    self._unlike = _mismatch(rank, theirs, place)
                    self._send(rank, ("repeat", None, None))
                else:
                    self._latch.trip(_mismatch(rank, theirs, place))
        # Of a rank that was lost since, nothing counts. One may be lost between any two of these lines: what is then
        # known of it is known at the next meeting.
        self.generation = self._roster.generation
        self.ranks = tuple(rank for rank in self._roster.living if rank in arrived)
        return {rank: arrived[rank] for rank in self.ranks}

    def _is_to_be_repeated(self, place: Place) -> bool:
        return self._broken and place.section > 0 and place.name != END

    def _is_further(self, theirs: Place, place: Place) -> bool:
        same = theirs[:2] == place[:2] and place.section > 0
        return same and theirs.name == END

    def _is_behind(self, theirs: Place, place: Place) -> bool:
        same = theirs[:2] == place[:2] and place.section > 0
        return same and place.name == END

    def _send_back(self, arrived: dict[int, Any]) -> None:
        for rank in arrived:
            self._send(rank, ("repeat", None, None))

    def _answer(self, arrived: dict[int, Any], value: Any) -> None:
        for rank in arrived:
            self._send(rank, ("result", (self.ranks, self.generation), value))

    def _ready(self, ranks: list[int]) -> list[int]:
        """Those of the ranks that have brought something; waits a moment for one."""
        with self._lock:
            early = [rank for rank in ranks if rank in self._early]
            found = {self._connections[rank]: rank for rank in ranks if rank in self._connections}
        if early:
            return early
        waited_for: list[Any] = [*found, self._wake_out]
        ready: list[Any] = wait(waited_for, timeout=LOOK_S)
        if self._wake_out in ready:
            self._wake_out.recv(4096)
        return [found[connection] for connection in ready if connection is not self._wake_out]

    def _receive(self, rank: int) -> tuple[Place, Any] | None:
        with self._lock:
            early = self._early.pop(rank, None)
            connection = self._connections.get(rank)
        if early is not None or connection is None:
            return early
        try:
            place, value = receive_object(connection)
        except ChannelClosedError as error:
            self._on_lost(rank, str(error))
            return None
        return Place(*place), value

    def _send(self, rank: int, answer: tuple[str, Any, Any]) -> None:
        with self._lock:
            connection = self._connections.get(rank)
        if rank == 0 or connection is None:
            return
        try:
            send_object(connection, answer)
        except ChannelClosedError as error:
            self._on_lost(rank, str(error))

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except OSError:
            # Full: it is about to wake anyway. Closed: nobody waits.
            return


def _mismatch(rank: int, theirs: Place, place: Place) -> RunFailure:
    return RunFailure(
        rank,
        f"it has come to {theirs.name!r} ({theirs.number}) while rank 0 is at {place.name!r} ({place.number}): a hook "
        "that only some ranks run has called a collective. Call it on every rank, in the same order",
    )
