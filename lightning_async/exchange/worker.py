"""The worker: a rank's side of the exchange: draws tickets, pushes gradients, lands fresh parameters."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

from lightning_async.exchange.param_views import ParameterViews
from lightning_async.exchange.session import DROPPED
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.layout import FlatLayout, exchanged_parameters
from lightning_async.holder.tally import Tally
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.threads import Errands
from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.fields import pack_bitmap, unpack_counts
from lightning_async.transport.message import Kind, Message

__all__ = ["RequestRefusedError", "Worker"]

_T = TypeVar("_T")

# How long the heartbeat's news (who failed, and why) may trail the loss of the channel.
_NEWS_TIMEOUT_S = 3.0
# How long a thread that exchanges a payload may take to see that its channel is closed.
_EXCHANGE_ENDS_S = 1.0


class RequestRefusedError(RuntimeError):
    """The holder refused a request of this worker; the message says why."""


class _Slot:
    """One of the worker's conversations with the holder.

    Attributes:
        version: version of the parameters that it last read, at which its next gradient is computed.
        reading: whether the holder counts on a gradient from this slot.
        unanswered: the push that was sent and not answered yet.
        under_way: where another thread sends that push and takes what comes back, its answer.
    """

    def __init__(self, channel: Channel, layout: FlatLayout, optimizers: int) -> None:
        self.channel = channel
        self.gradients = [layout.views(channel.buffers.gradient, index) for index in range(optimizers)]
        self.version = 0
        self.reading = False
        self.unanswered: Message | None = None
        self.under_way: Future[Message] | None = None


class Worker:
    """One rank's view of the holder.

    Fresh parameters install at a step boundary only, while this rank waits for them: writing them while a forward or
    backward runs would silently falsify the gradient.

    With one channel a step waits for its answer. With two, the slots take turns: while the holder works on the push of
    one, this rank computes the next batch at the parameters that the other read one step earlier; payloads that travel
    do so in a thread of their own meanwhile, where the channel allows that. To the holder and its
    barrier each slot is a reader of its own, so the version that a gradient was computed at is the one that counts.
    The slot that read first always pushes first: else the barrier could hold its push back for the sake of the other
    one, which waits for this very answer.

    Args:
        rank: this rank.
        channels: the worker's end of its channel, or of two.
        layout: where each parameter lies.
        optimizers: the module's optimizers, in the layout's order; read for gradients and hyperparameters.
        latch: the run's failure latch.
        alone: whether it is the holder's only worker, so that a step changes the parameters of its optimizer alone.
    """

    def __init__(
        self,
        rank: int,
        channels: Channel | Sequence[Channel],
        layout: FlatLayout,
        optimizers: Sequence[torch.optim.Optimizer],
        latch: FailureLatch,
        alone: bool = False,
    ) -> None:
        self.rank = rank
        self._alone = alone
        self.version = 0
        self.waited_s = 0.0
        # Called with what this rank did from when to when, in nanoseconds of the monotonic clock: "draw", "push",
        # "wait", "pull".
        self.on_span: Callable[[str, int, int], None] | None = None
        # What is counted besides updates, if anything is: reported with what this rank sends to the holder.
        self.tally: Tally | None = None
        self._layout = layout
        self._hyperparams = [HyperparamReader(optimizer, HyperparamLayout(optimizer)) for optimizer in optimizers]
        self._latch = latch
        self._slots = [
            _Slot(channel, layout, len(optimizers))
            for channel in ([channels] if isinstance(channels, Channel) else channels)
        ]
        self._turn = 0
        # Tickets that were drawn and not handed on, in the order in which the holder leased them.
        self._drawn: deque[range] = deque()
        self._over = False
        self._tickets = 0
        self._samples = 0
        # With several optimizers a batch has several pushes, and only its last would have to ask.
        self._draws_with_push = len(optimizers) == 1
        self._last_wait_s = 0.0
        buffers = self._slots[0].channel.buffers
        self._module_buffer = buffers.parameters
        if self._overlaps:
            # A landing of its own, so that the slot that is not computed with can be filled meanwhile.
            self._module_buffer = torch.empty_like(self._module_buffer)
            buffers = Buffers(buffers.gradient, self._module_buffer)
        owned = [exchanged_parameters(optimizer) for optimizer in optimizers]
        self._views = ParameterViews(owned, layout, buffers, moves_gradients=not self._overlaps)
        # It sends one push after the other, and is there from the beginning: where memory is short no thread starts.
        self._exchanges = Errands("exchange")
        if self._overlaps:
            self._exchanges.start()

    @property
    def _overlaps(self) -> bool:
        return len(self._slots) > 1

    @property
    def _slot(self) -> _Slot:
        return self._slots[self._turn]

    @property
    def has_unreported_batches(self) -> bool:
        """Whether batches were computed since the last push."""
        return self._tickets > 0

    def draw(self) -> range:
        """Draws the next tickets; empty if this rank's segment is over."""
        if not self._drawn:
            for slot in self._slots:
                self._take_answer(slot)
        if self._drawn:
            return self._drawn.popleft()
        if self._over:
            self._over = False
            return range(0)
        tickets = self._draw()
        if tickets and self._overlaps and not any(slot.reading for slot in self._slots):
            # One for each slot; from here on every answer brings the next.
            self._drawn.append(self._draw())
            if not self._drawn[0]:
                self._drawn.clear()
        return tickets

    def _draw(self) -> range:
        reply = self._request(self._slot, Message(Kind.DRAW, worker=self.rank), Kind.TICKETS)
        return range(reply.ticket, reply.ticket + reply.tickets)

    def release(self, tickets: int, stream_over: bool) -> None:
        """Gives back the newest ``tickets`` drawn, which there are no batches for.

        Args:
            tickets: how many.
            stream_over: this rank's own stream, or loader, has ended: it draws nothing more in this epoch.
        """
        for slot in self._slots:
            self._take_answer(slot)
        given = Message(Kind.RELEASE, worker=self.rank, tickets=tickets, outcome=int(stream_over))
        self._request(self._slot, given, Kind.ACK)

    def stop_dispatch(self) -> None:
        """Ends the segment for every rank once the batches that are being computed are done."""
        for slot in self._slots:
            # More may come with an answer.
            self._take_answer(slot)
        if self._drawn:
            # They came with the last answer; a rank that wants to stop begins no further batch.
            self.release(sum(map(len, self._drawn)), stream_over=False)
            self._drawn.clear()
        self._request(self._slot, Message(Kind.CLOSE, worker=self.rank), Kind.ACK)

    def begin_batch(self, samples: int) -> None:
        """Notes that a batch is being computed; pulls parameters first if this rank holds none."""
        self._latch.check()
        if not self._slot.reading:
            self.pull()
        self._tickets += 1
        self._samples += samples

    def leave_out(self, tickets: int) -> None:
        """Notes batches that the loader has left out: they count as done."""
        self._tickets += tickets

    def pull(self) -> None:
        """Lands the holder's parameters, once the barrier lets this rank read."""
        for slot in self._slots:
            self._take_answer(slot)
        for slot in self._slots:
            if not slot.reading:
                self._pull(slot, Kind.PULL)
                slot.reading = True
        if self._overlaps:
            self._turn = min(range(len(self._slots)), key=lambda index: self._slots[index].version)
        self._install()

    def step(self, index: int) -> bool:
        """Pushes the gradients of one optimizer and lands the parameters that come back.

        Args:
            index: the optimizer.

        Returns:
            False if the holder dropped the push as too stale, or if no parameter has a gradient. With two slots that
            is not known yet, and a push that was sent counts as applied.

        Raises:
            WorkerFailedError: if the run has failed.
        """
        started = time.perf_counter()
        slot = self._slot
        present = self._views.gather(index, slot.gradients[index] if self._overlaps else None)
        if not any(present):
            return False
        if self._overlaps:
            # The answer has come while this batch was computed. One push at a time keeps a worker's pushes in order.
            self._take_answer(self._slots[1 - self._turn])
        payload = self._layout.segment(slot.channel.buffers.gradient, index)
        message = Message(
            Kind.PUSH,
            worker=self.rank,
            optimizer=index,
            version=slot.version,
            ticket=int(self._draws_with_push and len(self._drawn) < len(self._slots)),
            tickets=self._tickets,
            samples=self._samples,
            waited_s=self._last_wait_s,
            dtype=payload.dtype,
            payload_bytes=payload.nbytes,
            groups=self._hyperparams[index].packed(),
            present=pack_bitmap(present),
            counts=self._counted(),
        )
        self._tickets = self._samples = 0
        self._latch.check()
        pushed = time.monotonic_ns()
        if self._overlaps and slot.channel.serves_any_thread:
            slot.under_way = self._exchanges.submit(lambda: self._exchange(slot, message, payload))
        else:
            self._guarded(lambda: slot.channel.send(message, payload))
        self._tell_span("push", pushed)
        slot.unanswered = message
        applied = True
        if self._overlaps:
            self._turn = 1 - self._turn
            if self._slot.reading:
                self._install()
        else:
            applied = self._take_answer(slot)
            self._install(index if self._alone else None)
        self._last_wait_s = time.perf_counter() - started
        self.waited_s += self._last_wait_s
        return applied

    def finish_segment(self) -> None:
        """Leaves the barrier: this rank computes nothing for a while."""
        for slot in self._slots:
            self._take_answer(slot)
        self.skip()
        for slot in self._slots:
            self._leave(slot)
        if self._drawn:
            # They came with the answer to a push that ended the segment, after somebody else had given them back.
            self.release(sum(map(len, self._drawn)), stream_over=False)
        self._drawn.clear()
        self._over = False

    def skip(self) -> None:
        """Reports batches that gave no gradient, and gives the parameters back that nothing will be pushed for."""
        if self._tickets or (self.tally is not None and self.tally.has_news):
            for slot in self._slots:
                # The oldest batches are reported first, and a push that the barrier holds back has older ones.
                self._take_answer(slot)
            skipped = Message(Kind.SKIP, worker=self.rank, tickets=self._tickets, counts=self._counted())
            self._request(self._slot, skipped, Kind.ACK)
            self._tickets = self._samples = 0
        self._leave(self._slot)

    def _leave(self, slot: _Slot) -> None:
        if slot.reading:
            self._request(slot, Message(Kind.LEAVE, worker=self.rank), Kind.ACK)
            slot.reading = False

    def refresh(self) -> None:
        """Lands the holder's parameters, past the barrier; for the synchronous phase."""
        self._pull(self._slot, Kind.READ)
        self._install()

    def close(self) -> None:
        """Says goodbye and closes the channel."""
        try:
            for slot in self._slots:
                slot.channel.send(Message(Kind.GOODBYE, worker=self.rank))
        except ChannelClosedError:
            # The run has failed and everyone knows; there is nobody to say goodbye to.
            return
        finally:
            for slot in self._slots:
                slot.channel.close()
            self._exchanges.close(_EXCHANGE_ENDS_S)
            self._views.release()

    def _take_answer(self, slot: _Slot) -> bool:
        """Waits for the answer to the slot's push, if one is due; False if the push was dropped."""
        sent, slot.unanswered = slot.unanswered, None
        if sent is None:
            return True
        exchange, slot.under_way = slot.under_way, None
        reply = self._receive(slot, sent, Kind.PARAMETERS, exchange)
        if exchange is None:
            self._guarded(lambda: self._take_payload(slot, reply))
        slot.version = reply.version
        if sent.ticket:
            if reply.tickets:
                self._drawn.append(range(reply.ticket, reply.ticket + reply.tickets))
            self._over = not reply.tickets
            # Without further tickets the holder counts on nothing more from this slot.
            slot.reading = bool(reply.tickets)
        return reply.outcome != DROPPED

    def _pull(self, slot: _Slot, kind: Kind) -> None:
        started = time.perf_counter()
        reply = self._request(slot, Message(kind, worker=self.rank, counts=self._counted()), Kind.PARAMETERS)
        self._guarded(lambda: self._take_payload(slot, reply))
        slot.version = reply.version
        self.waited_s += time.perf_counter() - started

    def _counted(self) -> bytes:
        return b"" if self.tally is None else self.tally.take()

    def _exchange(self, slot: _Slot, push: Message, payload: Tensor) -> Message:
        """Sends a push and takes what comes back; in another thread than the one that computes."""
        slot.channel.send(push, payload)
        reply = slot.channel.receive()
        if reply.kind is Kind.PARAMETERS:
            self._take_payload(slot, reply)
        return reply

    def _take_payload(self, slot: _Slot, reply: Message) -> None:
        arrived = slot.channel.buffers.parameters
        if reply.payload_bytes != arrived.nbytes or reply.dtype is not arrived.dtype:
            raise RequestRefusedError(
                f"the holder answers with {reply.payload_bytes} bytes of {reply.dtype}, "
                f"this rank expects {arrived.nbytes} bytes of {arrived.dtype}"
            )
        slot.channel.receive_payload(arrived)

    def _install(self, index: int | None = None) -> None:
        """Makes the parameters that this turn's slot has read the module's own; those of one optimizer, if told."""
        started = time.monotonic_ns()
        slot = self._slot
        if self._overlaps:
            self._module_buffer.copy_(slot.channel.buffers.parameters)
        self._views.install(index)
        self.version = slot.version
        self._tell_span("pull", started)

    def _tell_span(self, name: str, started: int) -> None:
        if self.on_span is not None:
            self.on_span(name, started, time.monotonic_ns())

    def _request(self, slot: _Slot, message: Message, expected: Kind) -> Message:
        self._latch.check()
        self._guarded(lambda: slot.channel.send(message))
        return self._receive(slot, message, expected)

    def _receive(self, slot: _Slot, sent: Message, expected: Kind, exchange: Future[Message] | None = None) -> Message:
        started = time.monotonic_ns()
        reply = self._guarded(slot.channel.receive if exchange is None else exchange.result)
        self._tell_span("draw" if sent.kind is Kind.DRAW else "wait", started)
        if reply.kind is Kind.ABORT:
            self._latch.trip(RunFailure(reply.worker, reply.text, announced=self.rank != 0))
            self._latch.check()
        if reply.kind is Kind.REFUSE:
            raise RequestRefusedError(f"the holder refused rank {self.rank}: {reply.text}")
        if reply.kind is not expected:
            raise RequestRefusedError(f"the holder answers {sent.kind.name} with {reply.kind.name}")
        if reply.counts and self.tally is not None:
            self.tally.hear(unpack_counts(reply.counts))
        return reply

    def _guarded(self, exchange: Callable[[], _T]) -> _T:
        try:
            return exchange()
        except ChannelClosedError as error:
            failure = self._latch.wait(_NEWS_TIMEOUT_S) or RunFailure(0, f"lost by rank {self.rank}: {error}")
            self._latch.trip(failure)
            raise WorkerFailedError(failure) from error
