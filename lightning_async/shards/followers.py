"""All followers of one sequencing holder: what they are told, and how far they are."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from lightning_async.exchange.shared_payload import unpack
from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.shards.operations import Operation
from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.transport.fields import fit_text
from lightning_async.transport.message import Abort, Message

__all__ = ["FollowerLink", "Followers", "Report"]

# Told the place of an operation that is done, and what it was answered with.
Report: TypeAlias = Callable[[int, str | None], None]

log = logging.getLogger(__name__)


class FollowerLink(Protocol):
    """The way to a follower, which does what comes by it in the order of its coming.

    Attributes:
        name: what its process is called in messages.
    """

    name: str

    def send(self, place: int, operation: Operation) -> None:
        """Tells it what to do; returns at once.

        Args:
            place: the operation's number; each is larger than the one before.
            operation: what to do; that it is done is reported where `is_reported` says so.

        Raises:
            OSError: if the follower is gone.
        """


class _Waiting(NamedTuple):
    place: int
    channel: Channel
    message: Message


class Followers:
    """Tells every follower the same, in one order, and knows which of it all of them have done.

    Nothing here waits in a session's thread: an answer that a worker is to have once all shards have copied their parts
    is sent by the thread that hears of the last one.

    Args:
        links: makes the way to the followers of the shards 1, 2, ..., each of which is told what to report to.
        latch: the run's failure latch.
    """

    def __init__(self, links: Sequence[Callable[[Report], FollowerLink]], latch: FailureLatch) -> None:
        self._latch = latch
        self._places = itertools.count(1)
        # A signal's handler may come in the middle of anything, and end the run in order.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._teller = 0
        self._done = [0] * len(links)
        self._answers: dict[tuple[int, int], str | None] = {}
        self._waiting: list[_Waiting] = []
        # Answers of operations that nobody asks for are not kept.
        self._asked: set[int] = set()
        self._links = [make(functools.partial(self._hear, index)) for index, make in enumerate(links)]
        latch.subscribe(self._give_up)

    def tell(self, *operations: Operation, asks: bool = False) -> int:
        """Tells each follower what to do; to be called under the sequencing holder's lock, which makes the order.

        Args:
            operations: one for all, or one for each.
            asks: whether `answers` will ask for what it comes to.

        Returns:
            Its place in the order.

        Raises:
            RuntimeError: if this thread is in the middle of telling something else.
        """
        if self._teller == threading.get_ident():
            raise RuntimeError(
                f"the holder's shards were to {type(operations[0]).__name__} while this thread told them something "
                "else, which a signal's handler has interrupted. Let the handler set a flag, read in on_train_batch_end"
            )
        self._teller = threading.get_ident()
        try:
            place = next(self._places)
            if asks:
                with self._lock:
                    self._asked.add(place)
            for index, link in enumerate(self._links):
                self._send(link, place, operations[index if len(operations) > 1 else 0])
            return place
        finally:
            self._teller = 0

    def send_when_done(self, place: int, channel: Channel, message: Message) -> None:
        """Sends a message once all followers have done what they were told at ``place``; returns at once."""
        with self._lock:
            if min(self._done) < place and self._latch.failure is None:
                self._waiting.append(_Waiting(place, channel, message))
                return
        self._latch.check()
        channel.send(message)

    def wait(self, place: int) -> None:
        """Returns when all followers have done what they were told at ``place``.

        Raises:
            WorkerFailedError: if the run fails before.
        """
        with self._lock:
            # Each follower's process is watched over: if it ends or stops, the run fails.
            self._changed.wait_for(lambda: min(self._done) >= place or self._latch.failure is not None)
            done = min(self._done) >= place
        if not done:
            self._latch.check()

    def answers(self, place: int) -> list[Any]:
        """What each follower's shared payload has, of what they were asked at ``place``.

        Raises:
            WorkerFailedError: if the run fails before.
        """
        self.wait(place)
        with self._lock:
            self._asked.discard(place)
            addresses = [self._answers.pop((place, index)) for index in range(len(self._links))]
        return [None if address is None else unpack(address) for address in addresses]

    def _send(self, link: FollowerLink, place: int, operation: Operation) -> None:
        try:
            link.send(place, operation)
        except OSError as error:
            failure = RunFailure(0, f"{link.name} cannot be reached: {error}")
            # Its heartbeat knows more, a moment later.
            self._latch.explain_loss(lambda: failure)

    def _hear(self, follower: int, place: int, answer: str | None = None) -> None:
        """A follower has done what it was told at ``place``, and everything before; called in any thread."""
        with self._lock:
            self._done[follower] = place
            if place in self._asked:
                self._answers[place, follower] = answer
            reached = min(self._done)
            due = [one for one in self._waiting if one.place <= reached]
            self._waiting = [one for one in self._waiting if one.place > reached]
            self._changed.notify_all()
        for one in due:
            _deliver(one.channel, one.message)

    def _give_up(self, failure: RunFailure) -> None:
        with self._lock:
            due, self._waiting = self._waiting, []
            self._changed.notify_all()
        for one in due:
            _deliver(one.channel, Abort(failure.rank, fit_text(failure.reason)))


def _deliver(channel: Channel, message: Message) -> None:
    try:
        channel.send(message)
    except ChannelClosedError as error:
        # The side that reads from this worker learns of it too, and judges.
        log.debug("an answer does not reach its worker: %s", error)
