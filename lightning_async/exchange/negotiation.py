"""How a worker and the holder agree on a channel: NCCL between GPUs, shared memory on one host, TCP otherwise."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeAlias

import torch
from torch.distributed import Store, TCPStore

from lightning_async.exchange.nccl_negotiation import NcclNegotiator, accept_nccl
from lightning_async.exchange.options import Transport, WireDtype
from lightning_async.exchange.parted_channel import PartedChannel
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout, describe_model
from lightning_async.runtime.handshake import CONTROL, Address, HandshakeError, PeerInfo, handshake
from lightning_async.runtime.listening import allowed_ports
from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.devices import DeviceFacts, RankDevices
from lightning_async.transport.fields import fit_text
from lightning_async.transport.int8 import GradientWire, ParameterWire
from lightning_async.transport.link_share import LinkShare
from lightning_async.transport.message import Abort, Ack, Message, Refuse, Welcome, kind_of
from lightning_async.transport.nccl import NcclChannel
from lightning_async.transport.shm import SharedMemoryChannel, SharedSegment, host_identity
from lightning_async.transport.tcp import TcpChannel
from lightning_async.transport.unix_socket import Shortcut, find_shortcut
from lightning_async.transport.wire import PLAIN, RoundedWire, Wire

__all__ = ["ChannelNegotiator", "WireNames", "WorkerWires", "dial", "transport_of"]

# What gradients, and what parameters, are rounded to on a network.
WireNames: TypeAlias = tuple[WireDtype, WireDtype]

_UNROUNDED: WireNames = ("fp32", "fp32")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


class ChannelNegotiator:
    """Rank 0's side: offers each worker the best channel that both sides can have.

    Args:
        address: of rank 0's listener.
        transport: "auto", or the only channel to offer.
        numel: size of the flat buffers.
        dtype: of the flat buffers.
        wire: what payloads are rounded to on a network.
        device: of the holder.
        facts: what rank 0 says of its GPU if the holder is there; None otherwise.
        workers: number of ranks.
        on_segment: told of a worker's rank, slot and shared memory before the worker is told of it.
        needs_memory: the option for which every worker must have shared memory; empty if none does.
    """

    def __init__(
        self,
        address: Address,
        transport: Transport,
        numel: int,
        dtype: torch.dtype,
        wire: WireNames = _UNROUNDED,
        device: torch.device | None = None,
        facts: DeviceFacts = None,
        workers: int = 1,
        on_segment: Callable[[int, int, SharedSegment], None] = lambda worker, slot, segment: None,
        needs_memory: str = "",
    ) -> None:
        self._on_segment = on_segment
        self._needs_memory = needs_memory or ('transport="shm"' if transport == "shm" else "")
        self._wire = wire
        self._address = address
        self._transport = transport
        self._numel = numel
        self._dtype = dtype
        # Of rank 0's network: payloads that go out, and that come in.
        self._shares = LinkShare(), LinkShare()
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
        if self._needs_memory and not _shares_memory(peer):
            raise HandshakeError(
                f"{self._needs_memory} was asked for, and rank {peer.rank} cannot map the memory of rank 0: it is on "
                f"another host or in another container. {self._way_out}, which uses TCP for such ranks"
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
        with ExitStack() as offered:
            segment, shortcut = self._segment(peer), None
            if segment is not None:
                offered.callback(segment.release)
                self._on_segment(peer.rank, peer.slot, segment)
                if (shortcut := _make_shortcut()) is not None:
                    offered.callback(shortcut.close)
            offer = {
                "segment": segment.address if segment else None,
                "shortcut": shortcut.name if shortcut else None,
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
                fallback = offer | {"segment": None}
                connection.send(Welcome(peer.rank, json.dumps(fallback)))
        buffers = Buffers.allocate(self._numel, self._dtype)
        gradients, parameters = wire
        incoming = GradientWire(self._numel, self._dtype) if gradients == "int8" else None
        return TcpChannel(
            connection,
            buffers,
            self._address.timeout_s,
            _parameter_wire(parameters, self._numel, self._dtype),
            incoming or _rounded(gradients, self._numel, self._dtype),
            serves=True,
            shares=self._shares,
            late_reader=peer.overlaps,
        )

    def close(self) -> None:
        """Ends what is being connected, and the store."""
        if self._nccl is not None:
            self._nccl.close()
        with self._lock:
            self._store = None

    def _segment(self, peer: PeerInfo) -> SharedSegment | None:
        if self._transport == "tcp" or not _shares_memory(peer):
            return None
        try:
            return SharedSegment(self._numel, self._dtype)
        except OSError as error:
            mebibytes = 2 * self._numel * self._dtype.itemsize / 2**20
            self._complain(f"no {mebibytes:.0f} MiB of shared memory for rank {peer.rank}: {error}")
            return None

    def _complain(self, problem: str) -> None:
        if self._needs_memory:
            way_out = self._way_out.lower()
            raise HandshakeError(f"{problem}. Free some, or {way_out}, which uses TCP instead")
        log.warning("lightning_async: %s; it will use TCP, which is slower", problem)

    @property
    def _way_out(self) -> str:
        asked = self._needs_memory.startswith("transport")
        return 'Take transport="auto"' if asked else f"Leave {self._needs_memory} out"

    def _client(self) -> tuple[int, Store]:
        # The store, with its thread and port, exists only if NCCL needs it.
        with self._lock:
            if self._store is None:
                self._store = _open_store(self._address.host)
            return int(self._store.port), self._store.clone()


class WorkerWires:
    """How a worker's gradients lie on the wire: its slots share one, so what rounding loses in one goes by the next.

    Args:
        layout: where each parameter lies.
    """

    def __init__(self, layout: FlatLayout) -> None:
        self._layout = layout
        self._int8: GradientWire | None = None

    def gradients(self, name: str) -> Wire:
        """The wire of this name."""
        layout = self._layout
        if name != "int8":
            return _rounded(name, layout.numel, layout.dtype)
        if self._int8 is None:
            sizes = [[torch.Size(shape).numel() for shape in shapes] for shapes in layout.shapes]
            self._int8 = GradientWire(layout.numel, layout.dtype, sizes)
        return self._int8


def dial(
    address: Address,
    worker: int,
    layout: FlatLayout,
    groups: Sequence[HyperparamLayout],
    incarnation: int = 0,
    slot: int = 0,
    devices: RankDevices | None = None,
    overlaps: bool = False,
    wires: WorkerWires | None = None,
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
        wires: what all slots of this worker share.

    Raises:
        HandshakeError: if rank 0 refuses this worker, with its reason.
        ChannelClosedError: if rank 0 cannot be reached.
    """
    numel, dtype, model = layout.numel, layout.dtype, describe_model(layout, groups)
    devices = devices or RankDevices()
    claims: dict[str, Any] = {
        "model": model,
        "host": host_identity(),
        "slot": slot,
        "overlaps": overlaps,
        "device": devices.mine,
    }
    connection, welcome = handshake(address, worker, CONTROL, incarnation, **claims)

    def gpu_buffers() -> Buffers:
        return Buffers.allocate(numel, dtype, devices.own)

    with ExitStack() as on_error:
        on_error.callback(connection.close)
        channel = accept_nccl(connection, json.loads(welcome), address, worker, gpu_buffers, devices.own, overlaps)
        if not isinstance(channel, Channel):
            channel = _accept(connection, channel, address, layout, worker, overlaps, wires or WorkerWires(layout))
        on_error.pop_all()
    return channel


def _accept(
    connection: ControlConnection,
    offer: dict[str, Any],
    address: Address,
    layout: FlatLayout,
    worker: int,
    overlaps: bool,
    wires: WorkerWires,
) -> Channel:
    """The worker's side: takes what it can have of an offer of shared memory and TCP."""
    numel, dtype = layout.numel, layout.dtype
    if offer["segment"] is not None:
        try:
            buffers = SharedSegment.attach(offer["segment"], numel, dtype)
        except OSError as error:
            connection.send(Refuse(worker, fit_text(str(error))))
            offer = json.loads(_expect_welcome(connection.receive()).offer)
        else:
            shortcut = find_shortcut(offer["shortcut"]) if offer["shortcut"] else None
            try:
                connection.send(Ack(worker, takes_shortcut=shortcut is not None))
            except ChannelClosedError:
                if shortcut is not None:
                    shortcut.close()
                raise
            if shortcut is not None:
                connection.move_to(shortcut)
            return SharedMemoryChannel(connection, buffers)
    buffers = Buffers.allocate(numel, dtype)
    gradients, parameters = offer["wire"]
    incoming = _parameter_wire(parameters, numel, dtype)
    return TcpChannel(
        connection, buffers, address.timeout_s, wires.gradients(gradients), incoming, late_reader=overlaps
    )


def _open_store(host: str) -> TCPStore:
    """A store at the first port that is allowed and free."""
    *others, last = allowed_ports()
    for port in others:
        with suppress(RuntimeError):
            return TCPStore(host, port, is_master=True, wait_for_workers=False)
    return TCPStore(host, last, is_master=True, wait_for_workers=False)


def transport_of(channel: Channel) -> str:
    """What a channel is called, as in `Transport`; "in process" for one that moves nothing between processes."""
    if isinstance(channel, PartedChannel):
        return "tcp"
    for kind, name in ((SharedMemoryChannel, "shm"), (TcpChannel, "tcp"), (NcclChannel, "nccl")):
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


def _parameter_wire(name: str, numel: int, dtype: torch.dtype) -> Wire:
    return ParameterWire(numel, dtype) if name == "int8" else _rounded(name, numel, dtype)


def _rounded(name: str, numel: int, dtype: torch.dtype) -> Wire:
    rounded = _DTYPES.get(name)
    return PLAIN if rounded is None or rounded is dtype else RoundedWire(numel, rounded)


def _shares_memory(peer: PeerInfo) -> bool:
    mine = host_identity()
    return bool(mine) and peer.claims.get("host") == mine
