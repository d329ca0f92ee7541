"""Where the ranks of a run meet that goes on without those it loses: each sends what it has to rank 0, which answers.

A collective of torch's knows a fixed number of ranks, and when one of them dies some of the others may have come to its
end and others not. Here rank 0 alone decides what a meeting's result is, and who took part: the ranks that are in the
run when the last of them has come. Nothing that a lost rank was to bring is waited for.

What user code and torchmetrics do in a process group cannot be mended so. A *section* is a part of the synchronous
phase that can be repeated as a whole, such as a validation: if a rank is lost in it, all that are left repeat it.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, NamedTuple, TypeVar

from typing_extensions import override

from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.handshake import HandshakeError, PeerInfo
from lightning_async.runtime.process_identity import ProcessIdentity
from lightning_async.runtime.roster import Roster
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Welcome

__all__ = ["Meeting", "MeetingGuest", "MeetingHost", "Place", "RanksLostError", "receive_object", "send_object"]

_T = TypeVar("_T")

_SIZE = struct.Struct("<Q")
# Between two looks at whether the run has failed.
_LOOK_S = 0.5
_END = "the end of a section"
_IN_VAIN = (
    "a part of the run that all ranks make together, such as a validation, could not be finished twice in a row, "
    "though no rank was lost meanwhile: a process group of the ranks does not work, or a hook runs a collective on "
    "some of them"
)


class RanksLostError(RuntimeError):
    """A rank was lost in a section, which is to be repeated."""


class Place(NamedTuple):
    """Which meeting of a run it is, the same on all ranks.

    Attributes:
        section: number of the section that it is in; 0 outside of one.
        attempt: how often that section was begun before.
        number: how many meetings came before, in the attempt or outside of sections.
        name: what it is for.
    """

    section: int
    attempt: int
    number: int
    name: str


class Meeting(ABC):
    """One rank's side.

    Attributes:
        ranks: who took part in the last meeting, in rising order.
        generation: how often the ranks in the run had changed by then.
        host: the address that the ranks reach rank 0 at.
        is_host: whether this is rank 0's side.
    """

    is_host = False

    def __init__(self, ranks: tuple[int, ...], host: str) -> None:
        self.ranks = ranks
        self.host = host
        self.generation = 0
        self._met = 0
        self._sections = 0
        # Of the section that is under way: its attempt, and the meetings in it.
        self._attempt: int | None = None
        self._met_inside = 0

    @abstractmethod
    def gather(self, mine: _T, name: str) -> list[_T]:
        """What each rank in the run has brought, in the order of `ranks`.

        Args:
            mine: what this rank brings; can be pickled.
            name: what it is for; the same on all ranks.

        Raises:
            RanksLostError: if a rank was lost in the section that this is in.
            WorkerFailedError: if the run has failed.
        """

    @property
    def counts(self) -> tuple[int, int]:
        """How many meetings and sections there were, for a rank that joins."""
        return self._met, self._sections

    @counts.setter
    def counts(self, counts: tuple[int, int]) -> None:
        self._met, self._sections = counts

    @property
    def in_section(self) -> bool:
        """Whether a section is under way."""
        return self._attempt is not None

    def repeat_until_whole(
        self, body: Callable[[], None], restore: Callable[[], None], was_lost: Callable[[Exception], bool]
    ) -> None:
        """Runs a section until no rank was lost in it; a collective call.

        Args:
            body: the section; begins anew each time.
            restore: called before it is repeated, on every rank that is left; may meet.
            was_lost: whether an error of the body's comes from a rank that was lost.
        """
        self._sections += 1
        attempt = 0
        while True:
            self._attempt, self._met_inside = attempt, 0
            intact = True
            try:
                body()
            except RanksLostError:
                intact = False
            except BaseException as error:
                if not (isinstance(error, Exception) and was_lost(error)):
                    self._attempt = None
                    raise
                intact = False
            whole = self._end_section(intact)
            self._attempt = None
            if whole:
                return
            attempt += 1
            restore()

    @abstractmethod
    def _end_section(self, intact: bool) -> bool:
        """Meets at the end of an attempt; returns whether no rank was lost in it."""

    @abstractmethod
    def close(self) -> None:
        """Meets nobody any more; idempotent."""

    def _next(self, name: str) -> Place:
        if self._attempt is None:
            self._met += 1
            return Place(0, 0, self._met, name)
        self._met_inside += 1
        return Place(self._sections, self._attempt, self._met_inside, name)

    def _end_place(self) -> Place:
        assert self._attempt is not None
        return Place(self._sections, self._attempt, 0, _END)


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
        return self._broken and place.section > 0 and place.name != _END

    def _is_further(self, theirs: Place, place: Place) -> bool:
        same = theirs[:2] == place[:2] and place.section > 0
        return same and theirs.name == _END

    def _is_behind(self, theirs: Place, place: Place) -> bool:
        same = theirs[:2] == place[:2] and place.section > 0
        return same and place.name == _END

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
        ready: list[Any] = wait(waited_for, timeout=_LOOK_S)
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


class MeetingGuest(Meeting):
    """The side of every other rank.

    Args:
        connection: to rank 0; owned from here on.
        ranks: who is in the run.
        latch: the run's failure latch.
        host: the address that rank 0 is reached at.
    """

    def __init__(self, connection: ControlConnection, ranks: tuple[int, ...], latch: FailureLatch, host: str) -> None:
        super().__init__(ranks, host)
        self._connection = connection
        self._latch = latch

    @override
    def gather(self, mine: _T, name: str) -> list[_T]:
        gathered: list[_T] = self._ask(self._next(name), mine)
        return gathered

    @override
    def _end_section(self, intact: bool) -> bool:
        return bool(self._ask(self._end_place(), intact))

    @override
    def close(self) -> None:
        self._connection.close()

    def _ask(self, place: Place, mine: Any) -> Any:
        self._latch.check()
        try:
            send_object(self._connection, (tuple(place), mine))
            waited_for: list[Any] = [self._connection]
            while not wait(waited_for, timeout=_LOOK_S):
                self._latch.check()
            kind, present, value = receive_object(self._connection)
        except ChannelClosedError as error:
            reason = f"the meeting with it was broken off: {error}"
            raise WorkerFailedError(self._latch.explain_loss(lambda: RunFailure(0, reason))) from error
        if kind == "repeat":
            raise RanksLostError("a rank was lost")
        self.ranks, self.generation = present
        return value


def _mismatch(rank: int, theirs: Place, place: Place) -> RunFailure:
    return RunFailure(
        rank,
        f"it has come to {theirs.name!r} ({theirs.number}) while rank 0 is at {place.name!r} ({place.number}): a hook "
        "that only some ranks run has called a collective. Call it on every rank, in the same order",
    )


def send_object(connection: ControlConnection, value: Any) -> None:
    """Sends an object to a rank of the run.

    Raises:
        ChannelClosedError: if it is gone.
    """
    data = pickle.dumps(value)
    connection.send_encoded(_SIZE.pack(len(data)) + data)


def receive_object(connection: ControlConnection) -> Any:
    """Waits for an object from a rank of the run, which has proven that it is one.

    Raises:
        ChannelClosedError: if it is gone.
    """
    size = bytearray(_SIZE.size)
    connection.receive_bytes(memoryview(size))
    data = bytearray(_SIZE.unpack(size)[0])
    connection.receive_bytes(memoryview(data))
    # As what torch's collectives gather.
    return pickle.loads(data)
