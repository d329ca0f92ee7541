"""How a worker and the holder agree on a channel: NCCL between GPUs, shared memory on one host, Gloo otherwise."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.distributed import Store, TCPStore

from lightning_async.exchange.nccl_negotiation import NcclNegotiator, accept_nccl
from lightning_async.exchange.options import Transport, WireDtype
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout, describe_model
from lightning_async.runtime.handshake import CONTROL, Address, HandshakeError, PeerInfo, handshake
from lightning_async.runtime.process_groups import apart_from_groups
from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.devices import DeviceFacts, RankDevices
from lightning_async.transport.fields import fit_text
from lightning_async.transport.gloo import HOLDER_SIDE, WORKER_SIDE, GlooChannel, WireDtypes
from lightning_async.transport.message import Abort, Ack, Message, Refuse, Welcome, kind_of
from lightning_async.transport.nccl import NcclChannel
from lightning_async.transport.shm import SharedMemoryChannel, SharedSegment, host_identity
from lightning_async.transport.unix_socket import Shortcut, find_shortcut

__all__ = ["ChannelNegotiator", "WireNames", "dial", "transport_of"]

# What gradients, and what parameters, are rounded to on a network.
WireNames: TypeAlias = tuple[WireDtype, WireDtype]

_UNROUNDED: WireNames = ("fp32", "fp32")
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


class ChannelNegotiator:
    """Rank 0's side: offers each worker the best channel that both sides can have.

    Args:
        host: the address that the workers reach rank 0 at.
        transport: "auto", or the only channel to offer.
        numel: size of the flat buffers.
        dtype: of the flat buffers.
        wire: what payloads are rounded to on a network.
        device: of the holder.
        facts: what rank 0 says of its GPU if the holder is there; None otherwise.
        workers: number of ranks.
    """

    def __init__(
        self,
        host: str,
        transport: Transport,
        numel: int,
        dtype: torch.dtype,
        wire: WireNames = _UNROUNDED,
        device: torch.device | None = None,
        facts: DeviceFacts = None,
        workers: int = 1,
    ) -> None:
        self._wire = wire
        self._host = host
        self._transport = transport
        self._numel = numel
        self._dtype = dtype
        self._lock = threading.Lock()
        self._store: Any = None
        self._nccl: NcclNegotiator | None = None
        if device is not None and facts is not None and transport in ("auto", "nccl"):
            insists = transport == "nccl"
            self._nccl = NcclNegotiator(device, facts, workers, numel, dtype, insists, self._client)

    def check(self, peer: PeerInfo) -> None:
        """Refuses a worker for which there is no channel.

        Raises:
            HandshakeError: if only shared memory is wanted and the worker is on another host.
        """
        if self._transport == "shm" and not _shares_memory(peer):
            raise HandshakeError(
                f'transport="shm" was asked for, and rank {peer.rank} cannot map the memory of rank 0: it is on '
                'another host or in another container. Take transport="auto", which uses Gloo for such ranks'
            )

    def open(self, peer: PeerInfo, connection: ControlConnection) -> Channel:
        """Welcomes a worker and connects a channel to it.

        Raises:
            ChannelClosedError: if the worker goes away meanwhile.
            HandshakeError: if only shared memory or NCCL is wanted and cannot be had.
        """
        if self._nccl is not None and (channel := self._nccl.open(peer, connection)) is not None:
            return channel
        # The holder takes over what hooks do to rank 0's parameters, and must not take its own rounded ones for that.
        wire = _UNROUNDED if peer.rank == 0 else self._wire
        segment = self._segment(peer)
        shortcut = None if segment is None else _make_shortcut()
        try:
            pair = f"worker-{peer.rank}-{peer.slot}-{peer.incarnation}"
            offer = {
                "pair": pair,
                "segment": segment.address if segment else None,
                "shortcut": shortcut.name if shortcut else None,
                "store_port": self._store_port(segment),
                "wire": wire,
            }
            connection.send(Welcome(peer.rank, json.dumps(offer)))
            connection.settimeout(None)
            if segment is not None:
                answer = connection.receive()
                if isinstance(answer, Ack):
                    if shortcut is not None and answer.takes_shortcut:
                        connection.move_to(shortcut.take())
                    return SharedMemoryChannel(connection, segment.buffers)
                reason = answer.reason if isinstance(answer, Refuse) else f"it answers with {kind_of(answer).name}"
                self._complain(f"rank {peer.rank} could not map shared memory: {reason}")
                fallback = offer | {"segment": None, "store_port": self._store_port(None)}
                connection.send(Welcome(peer.rank, json.dumps(fallback)))
        finally:
            if segment is not None:
                segment.release()
            if shortcut is not None:
                shortcut.close()
        buffers = Buffers.allocate(self._numel, self._dtype)
        store, dtypes = self._store.clone(), _dtypes(wire)
        with apart_from_groups():
            return GlooChannel(connection, buffers, store, pair, HOLDER_SIDE, dtypes, peer.overlaps)

    def close(self) -> None:
        """Ends the store, and with it the wait of a session whose worker never came to it."""
        if self._nccl is not None:
            self._nccl.close()
        with self._lock:
            self._store = None

    def _segment(self, peer: PeerInfo) -> SharedSegment | None:
        if self._transport == "gloo" or not _shares_memory(peer):
            return None
        try:
            return SharedSegment(self._numel, self._dtype)
        except OSError as error:
            mebibytes = 2 * self._numel * self._dtype.itemsize / 2**20
            self._complain(f"no {mebibytes:.0f} MiB of shared memory for rank {peer.rank}: {error}")
            return None

    def _complain(self, problem: str) -> None:
        if self._transport == "shm":
            raise HandshakeError(f'{problem}. Free some, or take transport="auto", which uses Gloo instead')
        log.warning("lightning_async: %s; it will use Gloo, which is slower", problem)

    def _store_port(self, segment: SharedSegment | None) -> int:
        # The store, with its thread and port, exists only if a channel needs it.
        if segment is not None:
            return 0
        with self._lock:
            if self._store is None:
                self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
            return int(self._store.port)

    def _client(self) -> tuple[int, Store]:
        port = self._store_port(None)
        return port, self._store.clone()


def dial(
    address: Address,
    worker: int,
    layout: FlatLayout,
    groups: Sequence[HyperparamLayout],
    incarnation: int = 0,
    slot: int = 0,
    devices: RankDevices | None = None,
    overlaps: bool = False,
) -> Channel:
    """Connects a worker to its session.

    Args:
        address: of rank 0's listener.
        worker: this rank.
        layout: where each parameter lies.
        groups: which hyperparameters each optimizer's param groups have.
        incarnation: how many workers of this rank came before; a returning worker is a new incarnation.
        slot: which of the worker's slots this is.
        devices: where this rank computes; its host by default.
        overlaps: whether this rank computes while its answer is under way.

    Raises:
        HandshakeError: if rank 0 refuses this worker, with its reason.
        ChannelClosedError: if rank 0 cannot be reached.
    """
    numel, dtype, model = layout.numel, layout.dtype, describe_model(layout, groups)
    devices = devices or RankDevices()
    claims = {"model": model, "host": host_identity(), "slot": slot, "overlaps": overlaps, "device": devices.mine}
    connection, welcome = handshake(address, worker, CONTROL, incarnation, **claims)

    def gpu_buffers() -> Buffers:
        return Buffers.allocate(numel, dtype, devices.own)

    offer = accept_nccl(connection, json.loads(welcome), address, worker, gpu_buffers, devices.own, overlaps)
    if isinstance(offer, Channel):
        return offer
    if offer["segment"] is not None:
        try:
            buffers = SharedSegment.attach(offer["segment"], numel, dtype)
        except OSError as error:
            connection.send(Refuse(worker, fit_text(str(error))))
            offer = json.loads(_expect_welcome(connection.receive()).offer)
        else:
            shortcut = find_shortcut(offer["shortcut"]) if offer["shortcut"] else None
            connection.send(Ack(worker, takes_shortcut=shortcut is not None))
            if shortcut is not None:
                connection.move_to(shortcut)
            return SharedMemoryChannel(connection, buffers)
    store = TCPStore(address.host, offer["store_port"], is_master=False, wait_for_workers=False)
    buffers = Buffers.allocate(numel, dtype)
    return GlooChannel(connection, buffers, store, offer["pair"], WORKER_SIDE, _dtypes(offer["wire"]), overlaps)


def transport_of(channel: Channel) -> str:
    """What a channel is called, as in `Transport`; "in process" for one that moves nothing between processes."""
    for kind, name in ((SharedMemoryChannel, "shm"), (GlooChannel, "gloo"), (NcclChannel, "nccl")):
        if isinstance(channel, kind):
            return name
    return "in process"


def _expect_welcome(message: Message) -> Welcome:
    if not isinstance(message, Welcome):
        reason = message.reason if isinstance(message, (Refuse, Abort)) else ""
        raise HandshakeError(f"rank 0 answers the handshake with {kind_of(message).name}: {reason}")
    return message


def _make_shortcut() -> Shortcut | None:
    try:
        return Shortcut()
    except OSError as error:
        log.debug("control channels stay with TCP: %s", error)
        return None


def _dtypes(wire: Sequence[str]) -> WireDtypes:
    gradients, parameters = wire
    return WireDtypes(_DTYPES[gradients], _DTYPES[parameters])


def _shares_memory(peer: PeerInfo) -> bool:
    mine = host_identity()
    return bool(mine) and peer.claims.get("host") == mine
