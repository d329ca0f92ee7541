"""A slot: one of a worker's conversations with the holder, with at most one request under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from torch import Tensor

from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.tally import Tally
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.threads import Errands
from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.transport.fields import unpack_counts
from lightning_async.transport.message import (
    Abort,
    Ack,
    Draw,
    Goodbye,
    Leave,
    Message,
    Outcome,
    Parameters,
    Pull,
    Push,
    Read,
    Refuse,
    Tickets,
    kind_of,
)

__all__ = ["Answer", "Observation", "RequestRefusedError", "Slot"]

_T = TypeVar("_T")
_Reply = TypeVar("_Reply", Ack, Parameters, Tickets)


class RequestRefusedError(RuntimeError):
    """The holder refused a request of this worker; the message says why."""


class Observation:
    """What a worker tells besides its gradients, and to whom.

    Attributes:
        on_span: called with what this rank did from when to when, in nanoseconds of the monotonic clock: "draw",
            "push", "wait", "pull".
        tally: what is counted besides updates, if anything is: reported with what this rank sends to the holder.
        waited_s: seconds that this rank has waited for the holder.
    """

    def __init__(self) -> None:
        self.on_span: Callable[[str, int, int], None] | None = None
        self.tally: Tally | None = None
        self.waited_s = 0.0

    def tell_span(self, name: str, started_ns: int) -> None:
        """Tells of something that ends now."""
        if self.on_span is not None:
            self.on_span(name, started_ns, time.monotonic_ns())

    def counts(self) -> bytes:
        """What to report, packed; from here on it is reported."""
        return b"" if self.tally is None else self.tally.take()

    def hear(self, counts: bytes) -> None:
        """Notes the sums over all ranks, if an answer has brought them."""
        if counts and self.tally is not None:
            self.tally.hear(unpack_counts(counts))


class Answer(NamedTuple):
    """What the answer to a push says.

    Args:
        applied: False if the push was dropped as too stale, or rejected.
        tickets: the next tickets; None if the push has not asked for them.
    """

    applied: bool
    tickets: range | None


class Slot:
    """One conversation with the holder, which counts it as a reader of its own.

    Args:
        rank: this rank.
        channel: the worker's end of the slot's channel.
        layout: where each parameter lies.
        optimizers: number of optimizers.
        latch: the run's failure latch.
        observation: told of waiting, and asked for counts.

    Attributes:
        gradients: for each optimizer its views of the channel's gradient.
        payloads: for each optimizer its part of the channel's gradient.
        version: version of the parameters that were last read, at which the next gradient is computed.
        reading: whether the holder counts on a gradient from this slot.
    """

    def __init__(
        self,
        rank: int,
        channel: Channel,
        layout: FlatLayout,
        optimizers: int,
        latch: FailureLatch,
        observation: Observation,
    ) -> None:
        self.channel = channel
        gradient = channel.buffers.gradient
        self.gradients = [layout.views(gradient, index) for index in range(optimizers)]
        self.payloads = [layout.segment(gradient, index) for index in range(optimizers)]
        self.version = 0
        self.reading = False
        self._rank = rank
        self._latch = latch
        self._observation = observation
        # The push that was sent and not answered yet.
        self._unanswered: Push | None = None
        # Where another thread sends that push and takes what comes back, its answer.
        self._under_way: Future[Message] | None = None

    def request(self, message: Message, expected: type[_Reply]) -> _Reply:
        """Sends a request and returns its answer.

        Raises:
            WorkerFailedError: if the run has failed.
            RequestRefusedError: if the holder refuses, or answers with something else.
        """
        self._latch.check()
        self._guarded(lambda: self.channel.send(message))
        return self._receive(message, expected, self.channel.receive)

    def pull(self) -> None:
        """Takes the holder's parameters into the channel's buffer, once the barrier lets this slot read."""
        self._read(Pull(self._rank, self._observation.counts()))
        self.reading = True

    def refresh(self) -> None:
        """Takes the holder's parameters past the barrier; for the synchronous phase."""
        self._read(Read(self._rank, self._observation.counts()))

    def push(self, message: Push, background: Errands | None = None) -> None:
        """Sends a push and its gradient; `take_answer` takes the answer.

        Args:
            message: the push.
            background: runs the exchange, if this thread is not to wait for the payload.
        """
        started = time.monotonic_ns()
        payload = self.payloads[message.optimizer]
        if background is not None:
            self._under_way = background.submit(lambda: self._exchange(message, payload))
        else:
            self._guarded(lambda: self.channel.send(message, payload))
        self._observation.tell_span("push", started)
        self._unanswered = message

    def take_answer(self) -> Answer | None:
        """Waits for the answer to the push, and takes the parameters that it brings; None if none is due."""
        sent, self._unanswered = self._unanswered, None
        if sent is None:
            return None
        exchange, self._under_way = self._under_way, None
        if exchange is None:
            reply = self._receive(sent, Parameters, self.channel.receive)
            self._guarded(lambda: self._take_payload(reply))
        else:
            reply = self._receive(sent, Parameters, exchange.result)
        self.version = reply.version
        if sent.wants_tickets:
            # Without further tickets the holder counts on nothing more from this slot.
            self.reading = bool(reply.tickets)
        return Answer(reply.outcome is Outcome.APPLIED, reply.tickets if sent.wants_tickets else None)

    def leave(self) -> None:
        """Gives the parameters back that nothing will be pushed for."""
        if self.reading:
            self.finish()

    def finish(self) -> None:
        """Leaves the barrier, also where this slot has read nothing: the holder may count on it to read."""
        self.request(Leave(self._rank), Ack)
        self.reading = False

    def say_goodbye(self) -> None:
        """Ends the conversation in order.

        Raises:
            ChannelClosedError: if the holder is gone.
        """
        self.channel.send(Goodbye(self._rank))

    def close(self) -> None:
        """Closes the channel."""
        self.channel.close()

    def _read(self, request: Pull | Read) -> None:
        started = time.perf_counter()
        reply = self.request(request, Parameters)
        self._guarded(lambda: self._take_payload(reply))
        self.version = reply.version
        self._observation.waited_s += time.perf_counter() - started

    def _exchange(self, push: Push, payload: Tensor) -> Message:
        """Sends a push and takes what comes back; in another thread than the one that computes."""
        self.channel.send(push, payload)
        reply = self.channel.receive()
        if isinstance(reply, Parameters):
            self._take_payload(reply)
        return reply

    def _take_payload(self, reply: Parameters) -> None:
        arrived = self.channel.buffers.parameters
        if reply.payload_bytes != arrived.nbytes or reply.dtype is not arrived.dtype:
            raise RequestRefusedError(
                f"the holder answers with {reply.payload_bytes} bytes of {reply.dtype}, "
                f"this rank expects {arrived.nbytes} bytes of {arrived.dtype}"
            )
        self.channel.receive_payload(arrived)

    def _receive(self, sent: Message, expected: type[_Reply], receive: Callable[[], Message]) -> _Reply:
        started = time.monotonic_ns()
        reply = self._guarded(receive)
        self._observation.tell_span("draw" if isinstance(sent, Draw) else "wait", started)
        if isinstance(reply, Abort):
            self._latch.trip(RunFailure(reply.worker, reply.reason, announced=self._rank != 0))
            self._latch.check()
        if isinstance(reply, Refuse):
            raise RequestRefusedError(f"the holder refused rank {self._rank}: {reply.reason}")
        if not isinstance(reply, expected):
            raise RequestRefusedError(f"the holder answers {kind_of(sent).name} with {kind_of(reply).name}")
        if isinstance(reply, Parameters):
            self._observation.hear(reply.counts)
        return reply

    def _guarded(self, exchange: Callable[[], _T]) -> _T:
        try:
            return exchange()
        except ChannelClosedError as error:
            reason = f"lost by rank {self._rank}: {error}"
            raise WorkerFailedError(self._latch.explain_loss(lambda: RunFailure(0, reason))) from error
