"""A channel whose payloads go in parts: each to, and from, the shard of the holder that has that part of the vector.

The worker's end is a `PartedChannel`: messages and the first part go by a channel to rank 0, the other parts by a
connection of their own to each other shard. The session's end, on rank 0, is a `SequencedChannel`: it takes the first
part, and a gradient has arrived once the other shards have said that they have theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor
from typing_extensions import override

from lightning_async.exchange.described_values import bytes_of
from lightning_async.runtime.failure import describe_error
from lightning_async.runtime.threads import Errands
from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Goodbye, Message, Parameters, Part, Pull, Push, Read, kind_of

__all__ = ["PartConnection", "PartedChannel", "SequencedChannel"]

log = logging.getLogger(__name__)

# How long a thread that exchanges a part may take to see that its connection is closed.
_ENDS_S = 1.0


class PartConnection:
    """A worker's way to one shard: takes its part of a gradient there, and the same part of the parameters back.

    Args:
        worker: this rank.
        shard: number of the shard.
        place: which part of the flat vector it has.
        connection: to it; owned from here on.
        stall_s: seconds without a byte of a payload moved after which the shard is lost.
    """

    def __init__(self, worker: int, shard: int, place: slice, connection: ControlConnection, stall_s: float) -> None:
        self.shard = shard
        self.place = place
        self._worker = worker
        self._connection = connection
        self._stall_s = stall_s
        # Parts travel side by side, each in a thread that is there from the beginning.
        self._errands = Errands(f"part-{shard}")
        self._errands.start()
        self._answer: Future[int] | None = None
        connection.survive_cuts(stall_s)

    def begin(
        self, number: int, gradient: Tensor | None, parameters: Tensor, on_trouble: Callable[[int, str], None]
    ) -> None:
        """Begins to exchange; `take` waits for the end.

        Args:
            number: which push it is, if a gradient is sent.
            gradient: the whole one; None if parameters are asked for without one.
            parameters: the whole vector, of which this shard's part is filled.
            on_trouble: told of the shard and the reason if it is lost, in another thread.
        """

        def exchange() -> int:
            try:
                return self._exchange(
                    number, None if gradient is None else gradient[self.place], parameters[self.place]
                )
            except Exception as error:
                on_trouble(
                    self.shard, describe_error(error) if not isinstance(error, ChannelClosedError) else str(error)
                )
                raise

        self._answer = self._errands.submit(exchange)

    def take(self) -> int:
        """Waits until the part of the parameters is there; returns its version.

        Raises:
            ChannelClosedError: if the shard is gone.
            WireError: if it says something else.
        """
        answer, self._answer = self._answer, None
        assert answer is not None
        return answer.result()

    def say_goodbye(self) -> None:
        """Ends the exchange in order."""
        try:
            self._connection.send(Goodbye(self._worker))
        except ChannelClosedError as error:
            log.debug("shard %d is gone: %s", self.shard, error)

    def break_off(self) -> None:
        """Wakes the thread that exchanges, which then finds the connection closed; in any thread."""
        self._connection.shutdown()

    def close(self) -> None:
        """Closes the connection."""
        self._connection.shutdown()
        self._errands.close(_ENDS_S)
        self._connection.close()

    def _exchange(self, number: int, gradient: Tensor | None, parameters: Tensor) -> int:
        if gradient is not None:
            part = Part(self._worker, number, gradient.dtype, gradient.nbytes)
            self._connection.send_payload(part, bytes_of(gradient), self._stall_s)
        reply = self._connection.receive()
        if not isinstance(reply, Part) or (reply.dtype, reply.payload_bytes) != (parameters.dtype, parameters.nbytes):
            raise WireError(f"shard {self.shard} of the holder answers with {kind_of(reply).name} of another size")
        self._connection.receive_payload(bytes_of(parameters), self._stall_s)
        return reply.number


class PartedChannel(Channel):
    """The worker's end.

    A worker waits for the answer before it does anything else, so each shard's part of the parameters may arrive at any
    moment from its request on. The answer is there when all parts of the version that the first shard names are.

    Args:
        inner: the channel to rank 0; owned from here on.
        own: which part of the flat vector goes by it.
        parts: the ways to the other shards; owned from here on.
        on_trouble: told of a shard that is lost and how, in a thread of its own; the channel is closed then.
    """

    def __init__(
        self,
        inner: Channel,
        own: slice,
        parts: Sequence[PartConnection],
        on_trouble: Callable[[int, str], object] = lambda shard, reason: None,
    ) -> None:
        super().__init__(inner.buffers)
        self.inner = inner
        self._own = own
        self._parts = parts
        self._on_trouble = on_trouble
        self._pushes = 0
        self._version = 0
        self._closing = False

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        if isinstance(message, Goodbye):
            for part in self._parts:
                part.say_goodbye()
        if isinstance(message, Push):
            self._pushes += 1
        if isinstance(message, (Push, Pull, Read)):
            for part in self._parts:
                part.begin(self._pushes, payload, self.buffers.parameters, self._lose)
        self.inner.send(message, None if payload is None else payload[self._own])

    @override
    def receive(self) -> Message:
        reply = self.inner.receive()
        if isinstance(reply, Parameters):
            self._version = reply.version
        return reply

    @override
    def receive_payload(self, out: Tensor) -> None:
        self.inner.receive_payload(out[self._own])
        for part in self._parts:
            version = part.take()
            if version != self._version:
                raise WireError(
                    f"shard {part.shard} of the holder answers with version {version}, the first one with "
                    f"{self._version}"
                )

    def break_off(self) -> None:
        """Wakes the thread that waits for a part, which then finds it closed; in any thread."""
        self._closing = True
        for part in self._parts:
            part.break_off()

    @override
    def close(self) -> None:
        self._closing = True
        self.inner.close()
        for part in self._parts:
            part.close()

    def _lose(self, shard: int, reason: str) -> None:
        if not self._closing:
            self._on_trouble(shard, reason)
            # This rank may wait for rank 0, which waits for this part.
            self.inner.close()


class SequencedChannel(Channel):
    """The session's end, on rank 0.

    Args:
        inner: the channel to the worker; owned from here on.
        own: which part of the flat vector goes by it.
        wait_for_parts: waits until the other shards have their parts of the worker's push of this number.
    """

    def __init__(self, inner: Channel, own: slice, wait_for_parts: Callable[[int], object]) -> None:
        super().__init__(inner.buffers)
        self._inner = inner
        self._own = own
        self._wait_for_parts = wait_for_parts
        self._pushes = 0
        self._elsewhere_bytes = 0

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        self._inner.send(message, None if payload is None else payload[self._own])
        self._count(payload)

    @override
    def receive(self) -> Message:
        message = self._inner.receive()
        if isinstance(message, Push):
            self._pushes += 1
        return message

    @override
    def receive_payload(self, out: Tensor) -> None:
        self._inner.receive_payload(out[self._own])
        self._wait_for_parts(self._pushes)
        self._count(out)

    @override
    def close(self) -> None:
        self._inner.close()

    def _count(self, payload: Tensor | None) -> None:
        if payload is not None:
            self._elsewhere_bytes += payload.nbytes - payload[self._own].nbytes
        self.wire_bytes = self._inner.wire_bytes + self._elsewhere_bytes
