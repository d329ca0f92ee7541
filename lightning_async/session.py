"""A session: what the holder's side does for one worker, message by message.

Above `holder.py` and `tickets.py`; below `server.py`, which gives each session a thread and a channel. The session of
rank 0's own worker runs in that worker's thread; the code is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from lightning_async.failure import WorkerFailedError
from lightning_async.holder import Holder, Push
from lightning_async.layout import FlatLayout
from lightning_async.tickets import Ledger
from lightning_async.transport.base import Channel
from lightning_async.wire import Kind, Message, WireError, fit_text, unpack_bitmap

__all__ = ["APPLIED", "DROPPED", "Session", "SessionError"]

APPLIED, DROPPED = 1, 2


class SessionError(WireError):
    """A message that does not fit its session; names the worker."""


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
        groups: number of param groups of each optimizer.
    """

    def __init__(
        self,
        worker: int,
        channel: Channel,
        holder: Holder,
        ledger: Ledger,
        layout: FlatLayout,
        groups: Sequence[int],
    ) -> None:
        self.worker = worker
        self.finished = False
        self._channel = channel
        self._holder = holder
        self._ledger = ledger
        self._layout = layout
        self._groups = groups
        self._gradient = channel.buffers.gradient
        self._views = [layout.views(self._gradient, index) for index in range(len(groups))]
        self._parameters = channel.buffers.parameters

    def serve_one(self) -> None:
        """Receives one request and answers it.

        Raises:
            SessionError: if the request does not fit the session; the worker was told.
            ChannelClosedError: if the worker is gone.
            WorkerFailedError: if the run has failed; the worker was told.
        """
        message = self._channel.receive()
        if message.worker != self.worker:
            self._refuse(f"its message claims to come from worker {message.worker}")
        try:
            self._answer(message)
        except WorkerFailedError as error:
            failure = error.failure
            self._channel.send(Message(Kind.ABORT, worker=failure.rank, text=fit_text(failure.reason)))
            raise

    def _answer(self, message: Message) -> None:
        kind = message.kind
        if kind is Kind.PUSH:
            self._push(message)
        elif kind is Kind.DRAW:
            tickets = self._ledger.draw(self.worker)
            self._channel.send(Message(Kind.TICKETS, worker=self.worker, ticket=tickets.start, tickets=len(tickets)))
        elif kind is Kind.PULL:
            self._send_parameters(self._pull())
        elif kind is Kind.READ:
            self._send_parameters(self._holder.read(self._parameters))
        elif kind is Kind.SKIP:
            self._complete(message.tickets)
            self._acknowledge()
        elif kind is Kind.RETURN:
            self._give_back(message)
            self._acknowledge()
        elif kind is Kind.LEAVE:
            self._holder.leave(self.worker)
            self._acknowledge()
        elif kind is Kind.CLOSE:
            self._ledger.close()
            self._acknowledge()
        elif kind is Kind.GOODBYE:
            self.finished = True
        else:
            self._refuse(f"a worker may not send {kind.name}")

    def _push(self, message: Message) -> None:
        present = self._check_push(message)
        self._channel.receive_payload(self._layout.segment(self._gradient, message.optimizer))
        views = self._views[message.optimizer]
        push = Push(
            worker=self.worker,
            optimizer=message.optimizer,
            version_read=message.version,
            gradients=[view if there else None for view, there in zip(views, present, strict=True)],
            groups=message.groups,
            tickets=message.tickets,
            samples=message.samples,
            waited_s=message.waited_s,
        )
        try:
            update = self._holder.push(push)
        except ValueError as error:
            self._refuse(str(error))
        outcome = APPLIED if update.applied else DROPPED
        # A worker that wants its next tickets with the answer saves a round trip for each batch; if there are none, it
        # has nothing to wait at the barrier for.
        tickets = self._ledger.draw(self.worker) if message.ticket else range(0)
        if message.ticket and not tickets:
            self._send_parameters(self._holder.read(self._parameters), outcome)
        else:
            self._send_parameters(self._holder.pull(self.worker, self._parameters), outcome, tickets)

    def _check_push(self, message: Message) -> list[bool]:
        index = message.optimizer
        if index >= len(self._groups):
            self._refuse(f"it pushes for optimizer {index} of {len(self._groups)}")
        if message.dtype is not self._layout.dtype:
            self._refuse(f"it pushes {message.dtype}, the holder keeps {self._layout.dtype}")
        expected = self._layout.segment_bytes(index)
        if message.payload_bytes != expected:
            self._refuse(f"it pushes {message.payload_bytes} bytes for optimizer {index}, which has {expected}")
        if len(message.groups) != self._groups[index]:
            self._refuse(f"it sends {len(message.groups)} param groups, the holder has {self._groups[index]}")
        if message.tickets > self._ledger.leased(self.worker):
            self._refuse(f"it reports {message.tickets} batches and was handed {self._ledger.leased(self.worker)}")
        try:
            return unpack_bitmap(message.present, len(self._views[index]))
        except WireError as error:
            self._refuse(str(error))

    def _pull(self) -> int:
        try:
            return self._holder.pull(self.worker, self._parameters)
        except ValueError as error:
            self._refuse(str(error))

    def _complete(self, tickets: int) -> None:
        try:
            self._ledger.complete(self.worker, tickets)
        except ValueError as error:
            self._refuse(str(error))

    def _give_back(self, message: Message) -> None:
        try:
            self._ledger.give_back(self.worker, message.tickets, stream_over=bool(message.outcome))
        except ValueError as error:
            self._refuse(str(error))

    def _send_parameters(self, version: int, outcome: int = 0, tickets: range = range(0)) -> None:
        message = Message(
            Kind.PARAMETERS,
            worker=self.worker,
            version=version,
            ticket=tickets.start,
            tickets=len(tickets),
            outcome=outcome,
            dtype=self._parameters.dtype,
            payload_bytes=self._parameters.nbytes,
        )
        self._channel.send(message, self._parameters)

    def _acknowledge(self) -> None:
        self._channel.send(Message(Kind.ACK, worker=self.worker))

    def _refuse(self, reason: str) -> NoReturn:
        self._channel.send(Message(Kind.REFUSE, worker=self.worker, text=reason))
        raise SessionError(f"worker {self.worker} refused: {reason}")
