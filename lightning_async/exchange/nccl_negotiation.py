"""How a worker and the holder agree on a NCCL communicator, or that they do without.

Rank 0 makes one communicator at a time, in the order of ranks: two that come into being at once in one process can wait
for each other for ever. A worker that was offered one waits, on the control connection, until it is its turn. Both then
connect, and both say whether it worked; if not, they go on to the channel that they would have had otherwise.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Store, TCPStore

from lightning_async.runtime.listener import Address, HandshakeError, Visitor
from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.devices import DeviceFacts, nccl_obstacle
from lightning_async.transport.fields import fit_text
from lightning_async.transport.message import Kind, Message, WireError
from lightning_async.transport.nccl import (
    CONNECT_TIMEOUT_S,
    HOLDER_SIDE,
    WORKER_SIDE,
    Link,
    NcclChannel,
    nccl_communicator,
)

__all__ = ["NcclOffice", "accept_nccl"]

log = logging.getLogger(__name__)


class Turns:
    """Lets channels be made one at a time: first every rank's first lane, in the order of ranks, then the others.

    Args:
        workers: number of ranks; rank 0 needs no turn.
    """

    def __init__(self, workers: int) -> None:
        self._changed = threading.Condition()
        self._expected = {(0, rank) for rank in range(1, workers)}
        self._busy = False
        self._closed = False

    def take(self, rank: int, lane: int) -> None:
        """Waits until everyone before has had a turn, and nobody has one.

        Raises:
            ChannelClosedError: if `close` is called meanwhile.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (not self._busy and not any(other < (lane, rank) for other in self._expected))
            )
            if self._closed:
                raise ChannelClosedError("the run ends")
            self._busy = True

    def give(self, rank: int, lane: int, taken: bool) -> None:
        """Ends a turn, or says that none is needed."""
        with self._changed:
            self._expected.discard((lane, rank))
            if taken:
                self._busy = False
            self._changed.notify_all()

    def close(self) -> None:
        """Wakes everyone who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class NcclOffice:
    """Rank 0's side.

    Args:
        device: the holder's; a GPU, or nobody is offered anything.
        facts: what rank 0 says of it; None if it is not a GPU.
        workers: number of ranks.
        numel: size of the flat buffers.
        dtype: of the flat buffers.
        insists: a worker that cannot have NCCL ends the run, instead of going through host memory.
        store: gives the port of a store and a client of it.
    """

    def __init__(
        self,
        device: torch.device,
        facts: DeviceFacts,
        workers: int,
        numel: int,
        dtype: torch.dtype,
        insists: bool,
        store: Callable[[], tuple[int, Store]],
    ) -> None:
        self._device = device
        self._facts = facts
        self._numel = numel
        self._dtype = dtype
        self._insists = insists
        self._store = store
        self._turns = Turns(workers)
        self._lock = threading.Lock()
        self._link: Link | None = None

    def open(self, visitor: Visitor, connection: ControlConnection) -> Channel | None:
        """A channel over NCCL, or None if this worker gets another one.

        Raises:
            HandshakeError: if only NCCL is wanted and cannot be had.
            ChannelClosedError: if the worker goes away meanwhile, or the run ends.
        """
        if visitor.rank == 0:
            # Its own worker, where that one is served like the others.
            return None
        taken = False
        try:
            obstacle = nccl_obstacle(self._facts, visitor.claims.get("device"))
            if obstacle is None:
                pair = f"nccl-{visitor.rank}-{visitor.lane}-{visitor.incarnation}"
                port, store = self._store()
                offer = {"nccl": {"pair": pair, "store_port": port}}
                connection.send(Message(Kind.WELCOME, worker=visitor.rank, text=json.dumps(offer)))
                connection.settimeout(None)
                self._turns.take(visitor.rank, visitor.lane)
                taken = True
                connection.send(Message(Kind.ACK, worker=visitor.rank))
                channel, obstacle = self._connect(visitor, connection, store, pair)
                if channel is not None:
                    return channel
        finally:
            self._turns.give(visitor.rank, visitor.lane, taken)
        if self._insists:
            raise HandshakeError(
                f'transport="nccl" was asked for, and rank {visitor.rank} cannot use it: {obstacle}. '
                'Take transport="auto", which goes through host memory for such ranks'
            )
        if taken:
            log.warning(
                "lightning_async: NCCL with rank %d failed: %s; it goes through host memory, which is slower",
                visitor.rank,
                obstacle,
            )
        else:
            log.info("lightning_async: rank %d goes through host memory: %s", visitor.rank, obstacle)
        return None

    def close(self) -> None:
        """Ends what is being connected; nobody is offered anything any more."""
        self._turns.close()
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.abort()

    def _connect(
        self, visitor: Visitor, connection: ControlConnection, store: Store, pair: str
    ) -> tuple[Channel | None, str | None]:
        rank = visitor.rank
        link = Link(nccl_communicator(store, pair, HOLDER_SIDE, self._device), f"nccl-{rank}")
        with self._lock:
            self._link = link
        theirs, problem, failed = _Verdict(connection), "", False
        try:
            link.connect(CONNECT_TIMEOUT_S, theirs.is_against)
        except ChannelClosedError as error:
            failed = True
            # If the worker has given up first, the reason is its reason.
            problem = "" if theirs.is_against() else str(error)
        finally:
            with self._lock:
                self._link = None
        try:
            if failed:
                connection.send(Message(Kind.REFUSE, worker=rank, text=fit_text(problem)))
            verdict = theirs.wait()
            if not failed and verdict.kind is Kind.ACK:
                connection.send(Message(Kind.ACK, worker=rank))
                buffers = Buffers.allocate(self._numel, self._dtype, self._device)
                return NcclChannel(connection, buffers, link, HOLDER_SIDE, visitor.overlaps), None
            if not failed:
                connection.send(Message(Kind.REFUSE, worker=rank, text=verdict.text))
        except BaseException:
            link.abort()
            raise
        link.abort()
        return None, problem or verdict.text


def accept_nccl(
    connection: ControlConnection,
    offer: dict[str, Any],
    address: Address,
    worker: int,
    buffers: Callable[[], Buffers],
    device: torch.device,
    overlaps: bool = False,
) -> Channel | dict[str, Any]:
    """The worker's side: what it does with a welcome.

    Args:
        connection: to its session.
        offer: what the welcome says.
        address: of rank 0's front door.
        worker: this rank.
        buffers: makes this side's buffers, on ``device``.
        device: this rank's GPU.
        overlaps: whether this rank computes while its answer is under way.

    Returns:
        A channel over NCCL; or, if it was not offered or could not be had, the offer that remains.

    Raises:
        HandshakeError: if rank 0 insists on NCCL.
        ChannelClosedError: if rank 0 goes away.
    """
    if "nccl" not in offer:
        return offer
    try:
        return _connect_worker(connection, offer["nccl"], address, worker, buffers, device, overlaps)
    except BaseException:
        connection.close()
        raise


def _connect_worker(
    connection: ControlConnection,
    nccl: dict[str, Any],
    address: Address,
    worker: int,
    buffers: Callable[[], Buffers],
    device: torch.device,
    overlaps: bool = False,
) -> Channel | dict[str, Any]:
    _expect(connection.receive(), Kind.ACK)
    link, theirs = None, _Verdict(connection)
    try:
        store = TCPStore(address.host, nccl["store_port"], is_master=False, wait_for_workers=False)
        link = Link(nccl_communicator(store, nccl["pair"], WORKER_SIDE, device), "nccl")
        link.connect(CONNECT_TIMEOUT_S, theirs.is_against)
    except (ChannelClosedError, RuntimeError) as error:
        connection.send(Message(Kind.REFUSE, worker=worker, text=fit_text(str(error))))
    else:
        connection.send(Message(Kind.ACK, worker=worker))
    try:
        verdict = theirs.wait()
        if verdict.kind is not Kind.REFUSE:
            _expect(verdict, Kind.ACK)
            assert link is not None
            return NcclChannel(connection, buffers(), link, WORKER_SIDE, overlaps)
        if link is not None:
            link.abort()
        welcome = connection.receive()
        _expect(welcome, Kind.WELCOME)
        remaining: dict[str, Any] = json.loads(welcome.text)
        return remaining
    except BaseException:
        if link is not None:
            link.abort()
        raise


class _Verdict:
    """The other side's message on whether it has connected; may come while this side still tries to."""

    def __init__(self, connection: ControlConnection) -> None:
        self._connection = connection
        self._message: Message | None = None

    def is_against(self) -> bool:
        """Whether the other side has given up, or is gone."""
        if self._message is None and self._connection.is_readable():
            try:
                self._message = self._connection.receive()
            except (ChannelClosedError, WireError):
                # `wait` runs into the same.
                return True
        return self._message is not None and self._message.kind is not Kind.ACK

    def wait(self) -> Message:
        """The message."""
        if self._message is None:
            self._message = self._connection.receive()
        return self._message


def _expect(message: Message, kind: Kind) -> None:
    if message.kind is not kind:
        raise HandshakeError(f"rank 0 answers the handshake with {message.kind.name}: {message.text}")
