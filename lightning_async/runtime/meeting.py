"""Where the ranks of a run meet that goes on without those it loses: each sends what it has to rank 0, which answers.

A collective of torch's knows a fixed number of ranks, and when one of them dies some of the others may have come to its
end and others not. Here rank 0 alone decides what a meeting's result is, and who took part: the ranks that are in the
run when the last of them has come. Nothing that a lost rank was to bring is waited for.

What user code and torchmetrics do in a process group cannot be mended so. A *section* is a part of the synchronous
phase that can be repeated as a whole, such as a validation: if a rank is lost in it, all that are left repeat it.
"""

from __future__ import annotations

import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, NamedTuple, TypeVar

from typing_extensions import override

from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection

__all__ = ["END", "LOOK_S", "Meeting", "MeetingGuest", "Place", "RanksLostError", "receive_object", "send_object"]

_T = TypeVar("_T")

_SIZE = struct.Struct("<Q")
# Between two looks at whether the run has failed.
LOOK_S = 0.5
END = "the end of a section"


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
        return Place(self._sections, self._attempt, 0, END)


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
            while not wait(waited_for, timeout=LOOK_S):
                self._latch.check()
            kind, present, value = receive_object(self._connection)
        except ChannelClosedError as error:
            reason = f"the meeting with it was broken off: {error}"
            raise WorkerFailedError(self._latch.explain_loss(lambda: RunFailure(0, reason))) from error
        if kind == "repeat":
            raise RanksLostError("a rank was lost")
        self.ranks, self.generation = present
        return value


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
