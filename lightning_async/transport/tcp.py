"""The TCP data channel: payloads over the connection that carries their messages, to a worker on another host."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.link_share import LinkShare
from lightning_async.transport.message import Message, Read
from lightning_async.transport.readiness import say_ready, wait_until_ready
from lightning_async.transport.wire import PLAIN, Wire

__all__ = ["TcpChannel"]


class TcpChannel(Channel):
    """Messages and payloads over one connection.

    A payload has no deadline: it may take as long as the link needs, and the peer counts as lost when no byte has
    moved for a whole time-out. The end of the peer is noticed within milliseconds, also in the middle of a payload.

    What answers READ is never rounded: where the ranks meet, all have the holder's own parameters.

    Args:
        control: the connected control connection; owned from here on.
        buffers: this side's buffers.
        stall_s: seconds without a byte of a payload after which the peer is lost.
        outgoing: how this side's payloads lie on the wire.
        incoming: how the other side's payloads lie on the wire.
        serves: whether this is the holder's side.
        shares: of a holder's network, what all its channels have in common: for sending, and for receiving.
        late_reader: the worker may compute a batch before it takes its parameters: they are sent when it says that
            it is ready, or its batch would count as a standstill; both sides must say the same.
    """

    serves_any_thread = True

    def __init__(
        self,
        control: ControlConnection,
        buffers: Buffers,
        stall_s: float,
        outgoing: Wire = PLAIN,
        incoming: Wire = PLAIN,
        serves: bool = False,
        shares: tuple[LinkShare, LinkShare] | None = None,
        late_reader: bool = False,
    ) -> None:
        super().__init__(buffers)
        control.survive_cuts(stall_s)
        self._control = control
        self._stall_s = stall_s
        self._outgoing = outgoing
        self._incoming = incoming
        self._serves = serves
        self._late_reader = late_reader
        self._sending, self._receiving = shares or (LinkShare(), LinkShare())
        # The other side must not take a wait for a standstill.
        self._longest_turn_s = stall_s / 2
        # Whether the request under way is READ.
        self._reads_exactly = False

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        if not self._serves:
            self._reads_exactly = isinstance(message, Read)
        if payload is None:
            self._control.send(message)
            return
        exact = self._serves and (self._reads_exactly or self._outgoing.needs_exact)
        wire = PLAIN if exact else self._outgoing
        announced: Message | None = message
        if self._serves and self._late_reader:
            self._control.send(message)
            wait_until_ready(self._control)
            announced = None
        with self._sending.turn(wire.size(payload), self._longest_turn_s) as moved:
            for piece in wire.encode(payload, message):
                self._control.send_payload(announced, _memory(piece), self._stall_s, moved)
                announced = None
        if exact:
            self._outgoing.pass_exact(payload)
        self.wire_bytes += wire.size(payload)

    @override
    def receive(self) -> Message:
        message = self._control.receive()
        if self._serves:
            self._reads_exactly = isinstance(message, Read)
        return message

    @override
    def receive_payload(self, out: Tensor) -> None:
        if self._late_reader and not self._serves:
            say_ready(self._control)
        exact = not self._serves and (self._reads_exactly or self._incoming.needs_exact)
        wire = PLAIN if exact else self._incoming
        with self._receiving.turn(wire.size(out), self._longest_turn_s) as moved:
            for piece in wire.decode(out):
                self._control.receive_payload(_memory(piece), self._stall_s, moved)
        if exact:
            self._incoming.pass_exact(out)
        self.wire_bytes += wire.size(out)

    @override
    def close(self) -> None:
        self._control.shutdown()
        self._control.close()


def _memory(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)
