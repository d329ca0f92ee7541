"""A session: what the holder's side does for one worker, message by message."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from torch import Tensor

from lightning_async.data.ledger import Ledger
from lightning_async.exchange.fence import Fence
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import Push, Update, WaitingPush
from lightning_async.runtime.failure import WorkerFailedError
from lightning_async.runtime.health import Sick
from lightning_async.runtime.step_watch import StepWatch
from lightning_async.transport import message as wire
from lightning_async.transport.base import Channel
from lightning_async.transport.fields import (
    WireError,
    fit_text,
    pack_bitmap,
    pack_counts,
    unpack_bitmap,
    unpack_counts,
    unpack_hyperparams,
)
from lightning_async.transport.message import Abort, Message, Outcome, kind_of

__all__ = ["Arrived", "Session", "SessionError"]

Deliver: TypeAlias = Callable[[Channel, Message, Tensor], None]


class SessionError(WireError):
    """A message that does not fit its session; names the worker."""


@dataclass(slots=True)
class Arrived:
    """A push that has arrived and was checked; what is left is the holder's part, and the answer.

    Args:
        push: the push.
        wants_tickets: whether the answer is to bring the worker's next tickets.
        tickets: these tickets, once they are drawn.
        counted: whether the answer is to bring what all workers have counted.
    """

    push: Push
    wants_tickets: bool
    counted: bool
    tickets: range = range(0)


class Session:
    """Serves one worker: hands out tickets, takes its gradients, answers with fresh parameters.

    The channel's buffers are this worker's alone (a gradient and a copy of the parameters), so that no lock is held
    while bytes move.

    Args:
        worker: the worker's rank.
        channel: the holder's end of its channel.
        holder: the holder.
        ledger: the ledger.
        layout: where each parameter lies.
        groups: which hyperparameters each optimizer's param groups have.
        slot: which of the worker's slots this is.
        fence: keeps the session out once its worker was evicted; all slots of an incarnation have one.
        steps: told when the worker begins and ends a step; None where nobody watches.
        on_sick: called when its steps have become too slow.
        deliver: sends the message that announces parameters, and the parameters.
    """

    def __init__(
        self,
        worker: int,
        channel: Channel,
        holder: Holder,
        ledger: Ledger,
        layout: FlatLayout,
        groups: Sequence[HyperparamLayout],
        slot: int = 0,
        fence: Fence | None = None,
        steps: StepWatch | None = None,
        on_sick: Callable[[Sick], object] = lambda sick: None,
        deliver: Deliver = lambda channel, message, parameters: channel.send(message, parameters),
    ) -> None:
        self.worker = worker
        self._deliver = deliver
        self.slot = slot
        self.fence = fence or Fence(worker)
        self._steps = steps
        self._on_sick = on_sick
        self.finished = False
        self._channel = channel
        self._holder = holder
        self._ledger = ledger
        self._layout = layout
        self._groups = groups
        # Of each optimizer what came last: the bytes, and the numbers in them.
        self._hyperparams: list[tuple[bytes | None, tuple[float, ...]]] = [(None, ())] * len(groups)
        self._gradient = channel.buffers.gradient
        self._segments = [layout.segment(self._gradient, index) for index in range(len(groups))]
        self._views: list[list[Tensor | None]] = [
            [*layout.views(self._gradient, index)] for index in range(len(groups))
        ]
        self._all_present = [pack_bitmap([True] * len(views)) for views in self._views]
        self._parameters = channel.buffers.parameters
        self._reported_bytes = 0

    def serve_one(self) -> None:
        """Receives one request and answers it, waiting for both in the calling thread.

        Raises:
            SessionError: if the request does not fit the session; the worker was told.
            ChannelClosedError: if the worker is gone.
            WorkerFailedError: if the run has failed; the worker was told.
        """
        message = self._channel.receive()
        seen = self._holder.changes
        for _ in self.serve(message):
            self._holder.wait_for_change(seen)
            seen = self._holder.changes

    def serve(self, message: Message) -> Iterator[None]:
        """Answers one request; yields for as long as the barrier holds it back, to be resumed after a change.

        Raises:
            SessionError: if the request does not fit the session; the worker was told.
            ChannelClosedError: if the worker is gone.
            EvictedError: if the worker was taken out of the run.
            WorkerFailedError: if the run has failed; the worker was told.
        """
        if isinstance(message, wire.Push):
            return self.finish(self.arrive(message))
        self._check_sender(message)
        return self._serve(message)

    def arrive(self, message: wire.Push) -> Arrived:
        """Checks a push and takes its payload, with which `finish` goes on.

        Raises:
            SessionError: if it does not fit the session; the worker was told.
            ChannelClosedError: if the worker is gone.
            EvictedError: if the worker was taken out of the run.
        """
        self._check_sender(message)
        self._end_step()
        gradients = self._check_push(message)
        self._channel.receive_payload(self._segments[message.optimizer])
        push = Push(
            self.worker,
            message.optimizer,
            message.version,
            gradients,
            self._hyperparams[message.optimizer][1],
            message.tickets,
            message.samples,
            message.waited_s,
            self.slot,
            unpack_counts(message.counts),
            self._segments[message.optimizer],
            message.finite,
            self._channel.wire_bytes - self._reported_bytes,
        )
        self._reported_bytes = self._channel.wire_bytes
        return Arrived(push, message.wants_tickets, bool(message.counts))

    def finish(self, arrived: Arrived, done: tuple[Update, int | None] | None = None) -> Iterator[None]:
        """Has a push applied, and answers it; yields and raises as `serve` does.

        Args:
            arrived: the push.
            done: what became of it and the version that the worker has read, if it is applied already.
        """
        try:
            if done is None:
                update: Update | None = self._try_push(arrived)
                if update is None:
                    since = time.monotonic()
                    while update is None:
                        yield
                        update = self._try_push(arrived, time.monotonic() - since)
                version = None
            else:
                update, version = done
            outcome = Outcome.APPLIED
            if not update.applied:
                outcome = Outcome.REJECTED if update.rejected else Outcome.DROPPED
            if version is not None:
                with self.fence:
                    self._begin_step()
                self._send_parameters(version, outcome, arrived.tickets, arrived.counted)
            elif arrived.wants_tickets and not arrived.tickets:
                self._send_parameters(self._holder.read(self._parameters), outcome, counted=arrived.counted)
            else:
                yield from self._pull(outcome, arrived.tickets, counted=arrived.counted)
        except WorkerFailedError as error:
            self._tell_failure(error)
            raise

    def waiting(self, arrived: Arrived) -> WaitingPush:
        """A push as `Holder.push_together` takes it."""
        return WaitingPush(arrived.push, self._parameters, lambda: self._draw_next(arrived))

    def _check_sender(self, message: Message) -> None:
        if message.worker != self.worker:
            self._refuse(f"its message claims to come from worker {message.worker}")

    def _tell_failure(self, error: WorkerFailedError) -> None:
        self._channel.send(Abort(error.failure.rank, fit_text(error.failure.reason)))

    def _serve(self, message: Message) -> Iterator[None]:
        try:
            if isinstance(message, wire.Pull):
                self._count(message.counts)
                yield from self._pull(counted=bool(message.counts))
            else:
                self._answer(message)
        except WorkerFailedError as error:
            self._tell_failure(error)
            raise

    def _answer(self, message: Message) -> None:
        """Answers what the barrier never holds back."""
        match message:
            case wire.Draw():
                with self.fence:
                    drawn = self._ledger.draw(self.worker)
                self._channel.send(wire.Tickets(self.worker, drawn))
            case wire.Read(counts=counts):
                self._count(counts)
                self._send_parameters(self._holder.read(self._parameters), counted=bool(counts))
            case wire.Skip(tickets=tickets, counts=counts):
                self._count(counts)
                self._refuse_value_error(lambda: self._ledger.complete(self.worker, tickets))
                self._acknowledge()
            case wire.Release(tickets=tickets, stream_over=stream_over):
                self._refuse_value_error(lambda: self._ledger.release(self.worker, tickets, stream_over))
                self._acknowledge()
            case wire.Leave():
                with self.fence:
                    if self._steps is not None:
                        self._steps.leave(self.worker, self.slot)
                    self._holder.leave(self.worker, self.slot)
                self._acknowledge()
            case wire.Close():
                with self.fence:
                    self._ledger.close()
                self._acknowledge()
            case wire.Goodbye():
                self.finished = True
            case _:
                self._refuse(f"a worker may not send {kind_of(message).name}")

    def _try_push(self, arrived: Arrived, parked_s: float = 0.0) -> Update | None:
        try:
            with self.fence:
                return self._holder.try_push(arrived.push, parked_s, lambda: self._draw_next(arrived))
        except ValueError as error:
            self._refuse(str(error))

    def _draw_next(self, arrived: Arrived) -> bool:
        """Draws the worker's next tickets, if it wants them; tells whether it pulls next.

        A worker that gets them with the answer saves a round trip for each batch; if there are none, it has nothing to
        wait at the barrier for.
        """
        if arrived.wants_tickets:
            arrived.tickets = self._ledger.draw(self.worker)
        return bool(arrived.tickets) or not arrived.wants_tickets

    def _check_push(self, message: wire.Push) -> list[Tensor | None]:
        index = message.optimizer
        if index >= len(self._groups):
            self._refuse(f"it pushes for optimizer {index} of {len(self._groups)}")
        if message.dtype is not self._layout.dtype:
            self._refuse(f"it pushes {message.dtype}, the holder keeps {self._layout.dtype}")
        expected = self._layout.segment_bytes(index)
        if message.payload_bytes != expected:
            self._refuse(f"it pushes {message.payload_bytes} bytes for optimizer {index}, which has {expected}")
        # Before the gradient is applied; it is then that they are marked.
        try:
            self._ledger.check(self.worker, message.tickets)
        except ValueError as error:
            self._refuse(str(error))
        views = self._views[index]
        try:
            # They seldom change from one push to the next, and then there is nothing to check.
            if message.hyperparams != self._hyperparams[index][0]:
                self._hyperparams[index] = (
                    message.hyperparams,
                    unpack_hyperparams(message.hyperparams, self._groups[index].count),
                )
            if message.present == self._all_present[index]:
                return views
            present = unpack_bitmap(message.present, len(views))
        except WireError as error:
            self._refuse(str(error))
        return [view if there else None for view, there in zip(views, present, strict=True)]

    def _pull(
        self, outcome: Outcome = Outcome.NOT_PUSHED, tickets: range = range(0), counted: bool = False
    ) -> Iterator[None]:
        try:
            while (version := self._try_pull()) is None:
                yield
        except ValueError as error:
            self._refuse(str(error))
        self._send_parameters(version, outcome, tickets, counted)

    def _try_pull(self) -> int | None:
        with self.fence:
            version = self._holder.try_pull(self.worker, self._parameters, self.slot)
            if version is not None:
                self._begin_step()
            return version

    def _begin_step(self) -> None:
        if self._steps is not None:
            self._steps.begin(self.worker, self.slot, time.monotonic())

    def _end_step(self) -> None:
        if self._steps is None:
            return
        # What an evicted worker sends late is no step of its next incarnation's.
        with self.fence:
            sick = self._steps.end(self.worker, self.slot, time.monotonic())
        if sick is not None:
            self._on_sick(sick)

    def _count(self, counts: bytes) -> None:
        if counts:
            with self.fence:
                self._holder.count(unpack_counts(counts))

    def _refuse_value_error(self, act: Callable[[], object]) -> None:
        try:
            with self.fence:
                act()
        except ValueError as error:
            self._refuse(str(error))

    def _send_parameters(
        self,
        version: int,
        outcome: Outcome = Outcome.NOT_PUSHED,
        tickets: range = range(0),
        counted: bool = False,
    ) -> None:
        message = wire.Parameters(
            self.worker,
            version,
            outcome,
            tickets,
            self._parameters.dtype,
            self._parameters.nbytes,
            pack_counts(self._holder.counts) if counted else b"",
        )
        self._deliver(self._channel, message, self._parameters)

    def _acknowledge(self) -> None:
        self._channel.send(wire.Ack(self.worker))

    def _refuse(self, reason: str) -> NoReturn:
        self._channel.send(wire.Refuse(self.worker, fit_text(reason)))
        raise SessionError(f"worker {self.worker} refused: {reason}")
