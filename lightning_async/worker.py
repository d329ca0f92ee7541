"""The worker: a rank's side of the exchange: draws tickets, pushes gradients, lands fresh parameters.

Above `transport/` and `layout.py`; below `strategy.py` and `loops.py`. Knows no Lightning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_async.amsgrad import group_hyper
from lightning_async.binding import Binding
from lightning_async.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.layout import FlatLayout
from lightning_async.session import DROPPED
from lightning_async.transport.base import Channel, ChannelClosedError
from lightning_async.wire import Kind, Message, pack_bitmap

__all__ = ["RequestRefusedError", "Worker"]

_T = TypeVar("_T")

# How long the lifeline's news (who failed, and why) may trail the loss of the channel.
_NEWS_TIMEOUT_S = 3.0


class RequestRefusedError(RuntimeError):
    """The holder refused a request of this worker; the message says why."""


class Worker:
    """One rank's view of the holder.

    Fresh parameters land at a step boundary only, while this rank waits for them: writing them while a forward or
    backward runs would silently falsify the gradient.

    Args:
        rank: this rank.
        channel: the worker's end of its channel.
        layout: where each parameter lies.
        optimizers: the module's optimizers, in the layout's order; read for gradients and hyper-parameters.
        latch: the run's failure latch.
    """

    def __init__(
        self,
        rank: int,
        channel: Channel,
        layout: FlatLayout,
        optimizers: Sequence[torch.optim.Optimizer],
        latch: FailureLatch,
    ) -> None:
        self.rank = rank
        self.version = 0
        self.waited_s = 0.0
        # Called with what this rank did from when to when, in nanoseconds of the monotonic clock: "draw", "push",
        # "wait", "pull".
        self.on_span: Callable[[str, int, int], None] | None = None
        self._channel = channel
        self._layout = layout
        self._optimizers = optimizers
        self._latch = latch
        self._reading = False
        self._tickets = 0
        self._samples = 0
        # Tickets that came with the answer to a push; None if none were asked for.
        self._drawn: range | None = None
        # With several optimizers a batch has several pushes, and only its last would have to ask.
        self._draws_with_push = len(optimizers) == 1
        self._last_wait_s = 0.0
        self._gradient = channel.buffers.gradient
        self._arrived = channel.buffers.parameters
        self._binding = Binding([_parameters(optimizer) for optimizer in optimizers], layout, channel.buffers)

    @property
    def has_unreported_batches(self) -> bool:
        """Whether batches were computed since the last push."""
        return self._tickets > 0

    def draw(self) -> range:
        """Draws the next tickets; empty if this rank's segment is over."""
        if self._drawn is not None:
            drawn, self._drawn = self._drawn, None
            return drawn
        reply = self._request(Message(Kind.DRAW, worker=self.rank), Kind.TICKETS)
        return range(reply.ticket, reply.ticket + reply.tickets)

    def close_hand_out(self) -> None:
        """Ends the segment for every rank once the batches that are out have been computed."""
        self._request(Message(Kind.CLOSE, worker=self.rank), Kind.ACK)

    def begin_batch(self, samples: int) -> None:
        """Notes that a batch is being computed; pulls parameters first if this rank holds none."""
        self._latch.check()
        if not self._reading:
            self.pull()
        self._tickets += 1
        self._samples += samples

    def pull(self) -> None:
        """Lands the holder's parameters, once the barrier lets this rank read."""
        self._pull(Kind.PULL)
        self._reading = True

    def step(self, index: int) -> bool:
        """Pushes the gradients of one optimizer and lands the parameters that come back.

        Args:
            index: the optimizer.

        Returns:
            False if the holder dropped the push as too stale, or if no parameter has a gradient.

        Raises:
            WorkerFailedError: if the run has failed.
        """
        started = time.perf_counter()
        present = self._binding.gather(index)
        if not any(present):
            return False
        payload = self._layout.segment(self._gradient, index)
        asks = self._draws_with_push and self._drawn is None
        message = Message(
            Kind.PUSH,
            worker=self.rank,
            optimizer=index,
            version=self.version,
            ticket=int(asks),
            tickets=self._tickets,
            samples=self._samples,
            waited_s=self._last_wait_s,
            dtype=payload.dtype,
            payload_bytes=payload.nbytes,
            groups=tuple(group_hyper(group) for group in self._optimizers[index].param_groups),
            present=pack_bitmap(present),
        )
        self._tickets = self._samples = 0
        reply = self._request(message, Kind.PARAMETERS, payload)
        self._land(reply)
        if asks:
            self._drawn = range(reply.ticket, reply.ticket + reply.tickets)
            # Without further tickets the holder counts on nothing more from this rank.
            self._reading = bool(self._drawn)
        self._last_wait_s = time.perf_counter() - started
        self.waited_s += self._last_wait_s
        return reply.outcome != DROPPED

    def finish_segment(self) -> None:
        """Reports batches that gave no gradient and leaves the barrier: this rank computes nothing for a while."""
        if self._tickets:
            self._request(Message(Kind.SKIP, worker=self.rank, tickets=self._tickets), Kind.ACK)
            self._tickets = self._samples = 0
        if self._reading:
            self._request(Message(Kind.LEAVE, worker=self.rank), Kind.ACK)
            self._reading = False
        self._drawn = None

    def refresh(self) -> None:
        """Lands the holder's parameters, past the barrier; for the synchronous phase."""
        self._pull(Kind.READ)

    def close(self) -> None:
        """Says goodbye and closes the channel."""
        try:
            self._channel.send(Message(Kind.GOODBYE, worker=self.rank))
        except ChannelClosedError:
            # The run has failed and everyone knows; there is nobody to say goodbye to.
            return
        finally:
            self._channel.close()
            self._binding.release()

    def _pull(self, kind: Kind) -> None:
        started = time.perf_counter()
        self._land(self._request(Message(kind, worker=self.rank), Kind.PARAMETERS))
        self.waited_s += time.perf_counter() - started

    def _land(self, reply: Message) -> None:
        if reply.payload_bytes != self._arrived.nbytes or reply.dtype is not self._arrived.dtype:
            raise RequestRefusedError(
                f"the holder answers with {reply.payload_bytes} bytes of {reply.dtype}, "
                f"this rank expects {self._arrived.nbytes} bytes of {self._arrived.dtype}"
            )
        started = time.monotonic_ns()
        self._guarded(lambda: self._channel.receive_payload(self._arrived))
        self._binding.land()
        self.version = reply.version
        if self.on_span is not None:
            self.on_span("pull", started, time.monotonic_ns())

    def _request(self, message: Message, expected: Kind, payload: Tensor | None = None) -> Message:
        self._latch.check()

        def exchange() -> Message:
            started = time.monotonic_ns()
            self._channel.send(message, payload)
            sent = time.monotonic_ns()
            answer = self._channel.receive()
            if self.on_span is not None:
                if message.kind is Kind.PUSH:
                    self.on_span("push", started, sent)
                self.on_span("draw" if message.kind is Kind.DRAW else "wait", sent, time.monotonic_ns())
            return answer

        reply = self._guarded(exchange)
        if reply.kind is Kind.ABORT:
            self._latch.trip(RunFailure(reply.worker, reply.text, announced=self.rank != 0))
            self._latch.check()
        if reply.kind is Kind.REFUSE:
            raise RequestRefusedError(f"the holder refused rank {self.rank}: {reply.text}")
        if reply.kind is not expected:
            raise RequestRefusedError(f"the holder answers {message.kind.name} with {reply.kind.name}")
        return reply

    def _guarded(self, exchange: Callable[[], _T]) -> _T:
        try:
            return exchange()
        except ChannelClosedError as error:
            failure = self._latch.wait(_NEWS_TIMEOUT_S) or RunFailure(0, f"lost by rank {self.rank}: {error}")
            self._latch.trip(failure)
            raise WorkerFailedError(failure) from error


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
