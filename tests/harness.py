"""Parts of a run that a test puts together in one process: rank 0 without a trainer, ranks without a model.

`Exchange` is rank 0's side (parameters, holder, ledger, latch); `Exchange.serve` gives a worker a session of its own,
`Entrance` lets ranks in over sockets, `RankZero` launchers. `LoaderRank` and `StreamRank` are a rank's loop over its
batches, with a ledger in place of the exchange. `Call`, `eventually` and `socket_pair` are for threads and sockets.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_async import AMSGrad
from lightning_async.data.ledger import Ledger
from lightning_async.data.shared_loader import share_loader
from lightning_async.data.streams import OwnStream
from lightning_async.exchange.drawn_tickets import DrawnTickets
from lightning_async.exchange.session import Session
from lightning_async.exchange.worker import Worker
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import Update
from lightning_async.runtime.evictions import Evictions
from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.launcher_connection import LauncherConnection
from lightning_async.runtime.launchers import Launchers
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.roster import Roster
from lightning_async.transport import message as wire
from lightning_async.transport.base import Channel
from lightning_async.transport.fake import FakeChannel, Fault, fake_pair
from lightning_async.transport.fields import pack_bitmap
from lightning_async.transport.message import Message

__all__ = [
    "Call",
    "Entrance",
    "Exchange",
    "LoaderRank",
    "RankZero",
    "ServedSession",
    "StreamRank",
    "eventually",
    "socket_pair",
]


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Whether the condition comes true; a test that passes does not wait for the time-out."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection: of the one that connects, and of the one that accepts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        return mine, server.accept()[0]


class Call(threading.Thread):
    """Makes one call in a thread of its own, from now on, and keeps what comes of it."""

    def __init__(self, call: Callable[[], Any], name: str | None = None) -> None:
        super().__init__(daemon=True, name=name)
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def waits(self) -> bool:
        """Whether the call is still held back after a moment."""
        self.join(0.1)
        return self.is_alive()

    def ended(self, timeout_s: float = 20.0) -> BaseException | None:
        """What the call ended with, which must be soon: None or an error."""
        self.join(timeout_s)
        assert not self.is_alive(), "still waiting"
        return self.error

    def outcome(self, timeout_s: float = 20.0) -> Any:
        """The call's result, which must come soon; its error is raised."""
        error = self.ended(timeout_s)
        if error is not None:
            raise error
        return self.result


class Exchange:
    """What rank 0 exchanges: parameters of ones with an AMSGrad per list of shapes, holder, ledger and latch.

    ``updates`` are the holder's; ``applied`` are the tickets in their order, ``covered`` each worker's, push by push.
    """

    def __init__(
        self,
        *shapes: Sequence[Any],
        workers: int = 2,
        tickets: int = 0,
        barrier: StalenessBarrier | None = None,
        initial: Tensor | None = None,
    ) -> None:
        self.parameters = [[torch.nn.Parameter(torch.ones(shape)) for shape in own] for own in shapes]
        self.optimizers = [AMSGrad(own, lr=0.1) for own in self.parameters]
        self.layout = FlatLayout(self.parameters)
        self.hyperparams = [HyperparamLayout(optimizer) for optimizer in self.optimizers]
        self.latch = FailureLatch()
        self.barrier = barrier or StalenessBarrier(None)
        self.ledger = Ledger(workers)
        if tickets:
            self.ledger.begin_epoch(range(tickets))
            self.ledger.open(tickets)
        self.updates: list[Update] = []
        self.applied: list[int] = []
        self.covered: dict[int, list[tuple[int, ...]]] = {worker: [] for worker in range(workers)}
        initial = torch.ones(self.layout.numel) if initial is None else initial
        self.holder = Holder(self.layout, initial, self.optimizers, self.barrier, self.latch, self._observe)

    def _observe(self, update: Update) -> None:
        self.updates.append(update)
        worker = update.push.worker
        if worker in self.covered:
            self.covered[worker].append(self.ledger.complete(worker, update.push.tickets))
            self.applied += self.covered[worker][-1]

    def session(self, worker: int, channel: Channel, slot: int = 0) -> Session:
        """A worker's session, for the test to serve."""
        return Session(worker, channel, self.holder, self.ledger, self.layout, self.hyperparams, slot)

    def serve(self, worker: int, slot: int = 0, fault: Fault | None = None) -> ServedSession:
        """A worker's session in a thread of its own, over a channel that loses the connection where ``fault`` says."""
        mine, theirs = fake_pair(self.layout.numel, worker_fault=fault)
        return ServedSession(self.session(worker, theirs, slot), mine, theirs)

    def worker(self, rank: int, *channels: Channel) -> Worker:
        """A worker that trains the parameters at hand, with a slot for each channel."""
        return Worker(rank, list(channels), self.layout, self.optimizers, self.latch, looks_for_nonfinite=True)

    def push(self, worker: int, optimizer: int = 0, **changes: Any) -> wire.Push:
        """The message of a push that fits, but for ``changes``."""
        parameters, of = self.parameters[optimizer], self.optimizers[optimizer]
        fields: dict[str, Any] = {
            "worker": worker,
            "optimizer": optimizer,
            "dtype": torch.float32,
            "payload_bytes": 4 * sum(parameter.numel() for parameter in parameters),
            "hyperparams": HyperparamReader(of, self.hyperparams[optimizer]).packed(),
            "present": pack_bitmap([True] * len(parameters)),
        }
        return wire.Push(**(fields | changes))


class ServedSession:
    """A session in a thread of its own until it ends, and its worker's end of the channel."""

    def __init__(self, session: Session, channel: FakeChannel, theirs: Channel) -> None:
        self.session, self.channel, self._theirs = session, channel, theirs
        self._serving = Call(self._serve)

    def _serve(self) -> None:
        try:
            while not self.session.finished:
                self.session.serve_one()
        except BaseException:
            self._theirs.close()
            raise

    def ask(self, message: Message, payload: Tensor | None = None) -> Any:
        """Sends a request and returns the answer."""
        self.channel.send(message, payload)
        return self.channel.receive()

    def payload(self) -> Tensor:
        """The parameters that came with the last answer."""
        out = torch.full_like(self.channel.buffers.parameters, torch.nan)
        self.channel.receive_payload(out)
        return out

    def ended(self) -> BaseException | None:
        """What the session ended with."""
        return self._serving.ended()


class Entrance:
    """Rank 0's listener and the heartbeats that come in through it."""

    def __init__(self, workers: int, latch: FailureLatch) -> None:
        self.heartbeats = Heartbeats(0, latch, 60.0)
        self.listener = Listener("127.0.0.1", workers, self.heartbeats)

    def close(self) -> None:
        self.listener.close()
        self.heartbeats.close()


class RankZero:
    """Rank 0 of a run of two ranks on each of two hosts that goes on, and the launchers that come to it."""

    def __init__(self, most: int = 3) -> None:
        self.latch = FailureLatch()
        self.evictions = Evictions(Roster(range(4)), self.latch)
        self.evictions.under_way = True
        self.launchers = Launchers(self.evictions, self.latch, most)
        self.evictions.restart = self.launchers.replace
        self.evictions.steps.append(self._let_go)
        self.entrance = Entrance(4, self.latch)
        self.entrance.listener.on_launcher = self.launchers.take
        self.address = self.entrance.listener.address
        self.connections: list[LauncherConnection] = []

    def _let_go(self, rank: int, reason: str) -> None:
        if self.evictions.lets_go:
            self.launchers.let_go(rank, reason)

    def connect(self, ranks: tuple[int, ...] = (2, 3), unable: str = "") -> LauncherConnection:
        before = len(self.launchers._launchers)
        connection = LauncherConnection(self.address, ranks, 1, unable)
        self.connections.append(connection)
        assert eventually(lambda: len(self.launchers._launchers) > before)
        return connection

    def lose(self, rank: int, reason: str = "its process was killed by SIGKILL") -> None:
        self.evictions.lose(RunFailure(rank, reason))

    def close(self) -> None:
        self.launchers.close()
        for connection in self.connections:
            connection.close()
        self.entrance.close()
        self.latch.free_reserve()


class _Leases:
    """A rank's tickets, drawn from a ledger in the test's own thread."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        self.ledger, self.number = ledger, number
        self.drawn = DrawnTickets()

    def draw(self) -> range:
        handed = self.drawn.hand_on()
        if handed is None:
            self.drawn.add(self.ledger.draw(self.number))
            handed = self.drawn.hand_on()
        return handed or range(0)

    def release(self, tickets: int, over: bool) -> None:
        self.ledger.release(self.number, self.drawn.give_back(tickets), over)

    def report(self) -> tuple[range, ...]:
        reported = self.drawn.report()
        self.ledger.complete(self.number, reported)
        return reported


class LoaderRank:
    """A rank's training loop as far as its loader is concerned; ``seen`` are the samples of its batches.

    Each batch is reported before the next one begins, and it must be the very batch that the loader has delivered.
    """

    def __init__(self, ledger: Ledger, number: int, loader: DataLoader[Any], ranks: int, seed: int) -> None:
        self.ledger, self.number, self.visible = ledger, number, loader
        self.shared = share_loader(loader, ranks, number, seed)
        self.feed = self.shared.feed
        self.iterator: Iterator[Any] | None = None
        self.leases = _Leases(ledger, number)
        self.seen: list[int] = []
        self.most_leased = 0
        self.left_out = 0

    def begin_epoch(self, epoch: int, limit: int | None = None) -> str:
        self.iterator = None
        self.seen.clear()
        self.leases.drawn.begin_epoch()
        batches: Any = self.visible.batch_sampler
        batches.sampler.set_epoch(epoch)
        return self.shared.begin_epoch(epoch, limit)

    def open(self) -> None:
        self.feed.open(self.leases.draw, self.leases.release, self._leave_out)

    def _leave_out(self, tickets: int) -> None:
        self.left_out += tickets
        self.leases.drawn.leave_out(tickets)
        self.leases.report()

    def step(self) -> bool:
        """Computes one batch; False if there is none."""
        while self.feed.has_next():
            if self.iterator is None:
                self.iterator = iter(self.shared.loader)
            try:
                with self.feed.fetching():
                    (batch,) = next(self.iterator)
            except StopIteration:
                self.iterator = None
                self.feed.end_pass()
                continue
            self.most_leased = max(self.most_leased, self.ledger.leased(self.number))
            computed = [range(ticket, ticket + 1) for ticket in [*self.feed._loaded][:1]]
            assert self.feed.deliver() == len(batch)
            self.seen += batch.tolist()
            self.leases.drawn.begin_batch()
            assert [*self.leases.report()] == computed
            return True
        return False


class StreamRank:
    """A rank's loop over its own stream of ``length`` batches, with a push for each ``block`` of them.

    ``taken`` are its batches; ``done`` says that the segment is over for it.
    """

    def __init__(self, ledger: Ledger, number: int, length: int, block: int) -> None:
        self.number, self._block = number, block
        source = iter(range(length))
        self.stream = OwnStream(lambda: next(source))
        self.taken: list[int] = []
        self.leases = _Leases(ledger, number)
        self._unreported = 0
        self.done = True

    def open(self) -> None:
        self.stream.open(self.leases.draw, self.leases.release)
        self.done = False

    def step(self) -> bool:
        """One batch; at the end of the segment, what is left of an update."""
        if self.done:
            return False
        leases = self.leases
        if self.stream.has_next():
            self.taken.append(self.stream.take())
            leases.drawn.begin_batch()
            self._unreported += 1
            if self._unreported == self._block:
                self._push()
            return True
        if self._unreported:
            self._push()
        leases.ledger.release(self.number, leases.drawn.give_back_waiting(), False)
        leases.drawn.finish_segment()
        self.done = True
        return False

    def _push(self) -> None:
        self.leases.report()
        self._unreported = 0
        # The next permits come with the answer, unless there are some.
        if not self.leases.drawn.waiting:
            self.leases.drawn.add_answer(self.leases.ledger.draw(self.number))
