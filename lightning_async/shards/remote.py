"""A shard that is reached over the network, as rank 0 sees it."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from typing_extensions import override

from lightning_async.exchange.shared_payload import SharedPayload, unpack
from lightning_async.runtime.failure import FailureLatch, RunFailure, describe_error
from lightning_async.runtime.handshake import SEQUENCER, Address, HandshakeError, handshake
from lightning_async.shards import operations as told
from lightning_async.shards.arrivals import Arrivals
from lightning_async.shards.followers import FollowerLink, Report
from lightning_async.shards.frames import receive_frame, send_frame
from lightning_async.shards.shard_server import facts_of
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection

__all__ = ["RemoteShard"]

_ENDS_S = 1.0


class RemoteShard:
    """Rank 0's connection to one shard.

    Large values go by it as they are; to `Followers` they are shared payloads of this process.

    Args:
        shard: its number.
        rank: the rank that has started its process.
        address: of its listener.
    """

    def __init__(self, shard: int, rank: int, address: Address) -> None:
        self.shard = shard
        self.name = f"its process for shard {shard} of the holder"
        self._rank = rank
        self._address = address
        self._numbers = itertools.count(1)
        self._reports: dict[int, Report] = {}
        # Where it is noted which gradients have come, and by which follower.
        self._arrivals: tuple[int, Arrivals] | None = None
        self._answers: dict[int, SharedPayload] = {}
        self._sending = threading.Lock()
        self._latch: FailureLatch | None = None
        self._connection: ControlConnection | None = None
        self._reader = threading.Thread(target=self._read, name=f"shard-{shard}", daemon=True)
        self._ending = False

    def watch(self, latch: FailureLatch, timeout_s: float) -> None:
        """Connects; from here on the loss of the connection is a failure; idempotent.

        Args:
            latch: the run's failure latch.
            timeout_s: the address has it.

        Raises:
            HandshakeError: if the shard refuses.
            ChannelClosedError: if it cannot be reached.
        """
        if self._latch is not None:
            return
        self._latch = latch
        try:
            self._connection, _ = handshake(self._address, 0, SEQUENCER)
        except (HandshakeError, ChannelClosedError) as error:
            where = f"shard {self.shard} of the holder, on the host of rank {self._rank}"
            raise type(error)(f"{where}: {error}") from error
        self._connection.survive_cuts(timeout_s)
        self._reader.start()
        latch.subscribe(lambda failure: self._break_off())

    def open(self, report: Report) -> FollowerLink:
        """A link to a new follower there.

        Args:
            report: told what is done, in a thread of this process.
        """
        number = next(self._numbers)
        self._reports[number] = report
        return _Link(self, number)

    def note_parts_in(self, arrivals: Arrivals) -> None:
        """Has it noted which parts of gradients come for the follower that was opened last."""
        self._arrivals = (max(self._reports), arrivals)

    def end(self) -> None:
        """Says that the run is over, and closes the connection; idempotent."""
        if self._ending:
            return
        self._ending = True
        connection = self._connection
        if connection is None or self._latch is None:
            return
        if self._latch.failure is None:
            try:
                with self._sending:
                    send_frame(connection, None, self._address.timeout_s)
            except ChannelClosedError:
                # It is gone, and needs not be told.
                pass
        connection.shutdown()
        self._reader.join(_ENDS_S)
        connection.close()
        for payload in self._answers.values():
            payload.close()

    def tell(self, number: int, place: int, operation: told.Operation) -> None:
        """Sends a follower an operation; values take the place of shared payloads.

        Raises:
            OSError: if the shard is gone.
        """
        connection = self._connection
        assert connection is not None
        facts: dict[str, Any] | None = None
        sent: told.Operation | None = operation
        match operation:
            case told.Forget(asked):
                if (payload := self._answers.pop(asked, None)) is not None:
                    payload.close()
                return
            case told.Serve(address):
                # Code that was sent would have to be unpickled: the shard's own host has it.
                spec: told.ShardSpec = unpack(address)
                facts, sent = facts_of(spec) | {name: getattr(spec, name) for name in told.NUMBERS}, None
            case told.LoadParameters() | told.LoadStates() | told.Restore():
                sent = operation._replace(payload=unpack(operation.payload))
        try:
            with self._sending:
                send_frame(connection, [number, place, sent, facts], self._address.timeout_s)
        except TypeError as error:
            raise TypeError(
                f"what {self.name} is told has {error} in it, which cannot be sent to another host. Leave "
                "holder_shards out"
            ) from error

    def _read(self) -> None:
        connection, latch = self._connection, self._latch
        assert connection is not None and latch is not None
        try:
            while True:
                self._take(receive_frame(connection, self._address.timeout_s))
        except ChannelClosedError as error:
            if not self._ending:
                reason = f"{self.name} is lost by rank 0: {error}"
                latch.explain_loss(lambda: RunFailure(self._rank, reason))
        except Exception as error:
            # Workers wait for what would have been sent, and nobody else hears of this shard.
            latch.trip(RunFailure(0, f"the thread that hears of a shard failed: {describe_error(error)}"))

    def _take(self, news: list[Any]) -> None:
        assert self._latch is not None
        match news:
            case ["done", int(number), int(place), error, answer]:
                if error is not None:
                    self._latch.trip(RunFailure(self._rank, f"{self.name} failed: {error}"))
                    return
                address: str | None = None
                if answer is not None:
                    payload = self._answers[place] = SharedPayload(answer)
                    address = payload.address
                self._reports[number](place, address)
            case [str(what), int(number), int(worker), end]:
                if self._arrivals is None or self._arrivals[0] != number:
                    return
                if what == "part":
                    self._arrivals[1].note(self.shard, worker, end)
                else:
                    self._arrivals[1].lose(self.shard, worker, end)
            case _:
                raise ValueError(f"it says {news!r}")

    def _break_off(self) -> None:
        if self._connection is not None:
            self._connection.shutdown()


class _Link(FollowerLink):
    def __init__(self, shard: RemoteShard, number: int) -> None:
        self.name = shard.name
        self._shard = shard
        self._number = number

    @override
    def send(self, place: int, operation: told.Operation) -> None:
        self._shard.tell(self._number, place, operation)
