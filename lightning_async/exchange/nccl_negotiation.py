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
from typing import Any, TypeVar

import torch
from torch.distributed import Store, TCPStore

from lightning_async.runtime.handshake import Address, HandshakeError, PeerInfo
from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.devices import DeviceFacts, nccl_obstacle
from lightning_async.transport.fields import WireError, fit_text
from lightning_async.transport.message import Abort, Ack, Message, Refuse, Welcome, kind_of
from lightning_async.transport.nccl import (
    CONNECT_TIMEOUT_S,
    HOLDER_SIDE,
    WORKER_SIDE,
    NcclChannel,
    NcclExecutor,
    nccl_communicator,
)

__all__ = ["NcclNegotiator", "accept_nccl"]

log = logging.getLogger(__name__)

_M = TypeVar("_M", Ack, Welcome)


class Turns:
    """Lets channels be made one at a time: first every rank's first slot, in the order of ranks, then the others.

    Args:
        workers: number of ranks; rank 0 needs no turn.
    """

    def __init__(self, workers: int) -> None:
        self._changed = threading.Condition()
        self._expected = {(0, rank) for rank in range(1, workers)}
        self._busy = False
        self._closed = False

    def take(self, rank: int, slot: int) -> None:
        """Waits until everyone before has had a turn, and nobody has one.

        Raises:
            ChannelClosedError: if `close` is called meanwhile.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (not self._busy and not any(other < (slot, rank) for other in self._expected))
            )
            if self._closed:
                raise ChannelClosedError("the run ends")
            self._busy = True

    def give(self, rank: int, slot: int, taken: bool) -> None:
        """Ends a turn, or says that none is needed."""
        with self._changed:
            self._expected.discard((slot, rank))
            if taken:
                self._busy = False
            self._changed.notify_all()

    def close(self) -> None:
        """Wakes everyone who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class NcclNegotiator:
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
        self._executor: NcclExecutor | None = None

    def open(self, peer: PeerInfo, connection: ControlConnection) -> Channel | None:
        """A channel over NCCL, or None if this worker gets another one.

        Raises:
            HandshakeError: if only NCCL is wanted and cannot be had.
            ChannelClosedError: if the worker goes away meanwhile, or the run ends.
        """
        if peer.rank == 0:
            # Its own worker, where that one is served like the others.
            return None
        taken = False
        try:
            obstacle = nccl_obstacle(self._facts, peer.claims.get("device"))
            if obstacle is None:
                pair = f"nccl-{peer.rank}-{peer.slot}-{peer.incarnation}"
                port, store = self._store()
                offer = {"nccl": {"pair": pair, "store_port": port}}
                connection.send(Welcome(peer.rank, json.dumps(offer)))
                connection.settimeout(None)
                self._turns.take(peer.rank, peer.slot)
                taken = True
                connection.send(Ack(peer.rank))
                channel, obstacle = self._connect(peer, connection, store, pair)
                if channel is not None:
                    return channel
        finally:
            self._turns.give(peer.rank, peer.slot, taken)
        if self._insists:
            raise HandshakeError(
                f'transport="nccl" was asked for, and rank {peer.rank} cannot use it: {obstacle}. '
                'Take transport="auto", which goes through host memory for such ranks'
            )
        if taken:
            log.warning(
                "lightning_async: NCCL with rank %d failed: %s; it goes through host memory, which is slower",
                peer.rank,
                obstacle,
            )
        else:
            log.info("lightning_async: rank %d goes through host memory: %s", peer.rank, obstacle)
        return None

    def close(self) -> None:
        """Ends what is being connected; nobody is offered anything any more."""
        self._turns.close()
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.abort()

    def _connect(
        self, peer: PeerInfo, connection: ControlConnection, store: Store, pair: str
    ) -> tuple[Channel | None, str | None]:
        rank = peer.rank
        executor = NcclExecutor(nccl_communicator(store, pair, HOLDER_SIDE, self._device), f"nccl-{rank}")
        with self._lock:
            self._executor = executor
        theirs, problem, failed = _PeerDecision(connection), "", False
        try:
            executor.connect(CONNECT_TIMEOUT_S, theirs.is_against)
        except ChannelClosedError as error:
            failed = True
            # If the worker has given up first, the reason is its reason.
            problem = "" if theirs.is_against() else str(error)
        finally:
            with self._lock:
                self._executor = None
        try:
            if failed:
                connection.send(Refuse(rank, fit_text(problem)))
            decision = theirs.wait()
            if not failed and isinstance(decision, Ack):
                connection.send(Ack(rank))
                buffers = Buffers.allocate(self._numel, self._dtype, self._device)
                return NcclChannel(connection, buffers, executor, HOLDER_SIDE, peer.overlaps), None
            if not failed:
                connection.send(Refuse(rank, _reason_of(decision)))
        except BaseException:
            executor.abort()
            raise
        executor.abort()
        return None, problem or _reason_of(decision)


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
        address: of rank 0's listener.
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
    return _connect_worker(connection, offer["nccl"], address, worker, buffers, device, overlaps)


def _connect_worker(
    connection: ControlConnection,
    nccl: dict[str, Any],
    address: Address,
    worker: int,
    buffers: Callable[[], Buffers],
    device: torch.device,
    overlaps: bool = False,
) -> Channel | dict[str, Any]:
    _expect(connection.receive(), Ack)
    executor, theirs = None, _PeerDecision(connection)
    try:
        store = TCPStore(address.host, nccl["store_port"], is_master=False, wait_for_workers=False)
        executor = NcclExecutor(nccl_communicator(store, nccl["pair"], WORKER_SIDE, device), "nccl")
        executor.connect(CONNECT_TIMEOUT_S, theirs.is_against)
    except (ChannelClosedError, RuntimeError) as error:
        connection.send(Refuse(worker, fit_text(str(error))))
    else:
        connection.send(Ack(worker))
    try:
        decision = theirs.wait()
        if not isinstance(decision, Refuse):
            _expect(decision, Ack)
            assert executor is not None
            return NcclChannel(connection, buffers(), executor, WORKER_SIDE, overlaps)
        if executor is not None:
            executor.abort()
        welcome = _expect(connection.receive(), Welcome)
        remaining: dict[str, Any] = json.loads(welcome.offer)
        return remaining
    except BaseException:
        if executor is not None:
            executor.abort()
        raise


class _PeerDecision:
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
        return self._message is not None and not isinstance(self._message, Ack)

    def wait(self) -> Message:
        """The message."""
        if self._message is None:
            self._message = self._connection.receive()
        return self._message


def _expect(message: Message, expected: type[_M]) -> _M:
    if not isinstance(message, expected):
        raise HandshakeError(f"rank 0 answers the handshake with {kind_of(message).name}: {_reason_of(message)}")
    return message


def _reason_of(message: Message) -> str:
    return message.reason if isinstance(message, (Refuse, Abort)) else ""
