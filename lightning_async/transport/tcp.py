"""The TCP data channel: payloads over the connection that carries their messages, to a worker on another host."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.connection import ControlConnection
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
        # Whether the request under way is READ.
        self._reads_exactly = False

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        if not self._serves:
            self._reads_exactly = isinstance(message, Read)
        if payload is None:
            self._control.send(message)
            return
        wire = self._outgoing
        exact = self._serves and (self._reads_exactly or wire.needs_exact)
        data = (PLAIN if exact else wire).encode(payload, message)
        if exact:
            wire.pass_exact(payload)
        if self._serves and self._late_reader:
            self._control.send(message)
            wait_until_ready(self._control)
            self._control.send_payload(None, _memory(data), self._stall_s)
        else:
            self._control.send_payload(message, _memory(data), self._stall_s)
        self.wire_bytes += data.numel()

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
        wire = self._incoming
        exact = not self._serves and (self._reads_exactly or wire.needs_exact)
        arriving = (PLAIN if exact else wire).room_for(out)
        self._control.receive_payload(_memory(arriving), self._stall_s)
        self.wire_bytes += arriving.numel()
        if exact:
            wire.pass_exact(out)
        else:
            wire.decode(arriving, out)

    @override
    def close(self) -> None:
        self._control.shutdown()
        self._control.close()


def _memory(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)
