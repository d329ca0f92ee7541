"""The Gloo data channel: payloads over a process group of two ranks that belongs to this worker alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store
from typing_extensions import override

from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Message
from lightning_async.transport.readiness import say_ready, wait_until_ready

__all__ = ["HOLDER_SIDE", "WORKER_SIDE", "GlooChannel", "WireDtypes"]

HOLDER_SIDE, WORKER_SIDE = 0, 1
_CONNECT_TIMEOUT_S = 60.0
# A payload is posted by both sides within a round trip of its message, so its deadline is that of a slow network.
_PAYLOAD_BASE_S = 10.0
_SLOWEST_BYTES_PER_S = 10e6


class WireDtypes(NamedTuple):
    """What payloads are rounded to while they travel; None leaves them as they are."""

    gradients: torch.dtype | None = None
    parameters: torch.dtype | None = None


_UNROUNDED = WireDtypes()


class GlooChannel(Channel):
    """Messages over the control connection, payloads over a two-rank Gloo group.

    A group of its own per worker keeps one worker's death from the others: a time-out or a lost peer closes all pairs
    of the group that it happens in. After any error the group is not used again; a worker that returns is a new
    incarnation with a new group.

    Args:
        control: the connected control connection; owned from here on.
        buffers: this side's buffers.
        store: where the two sides find each other; shared by all workers.
        name: unique name of this worker's incarnation.
        side: `HOLDER_SIDE` or `WORKER_SIDE`.
        wire: what payloads are rounded to on their way; both sides must say the same.
        late_reader: the worker may compute a batch before it takes its parameters: they are posted when it says that
            it is ready, or their deadline would be one for the batch; both sides must say the same.

    Raises:
        ChannelClosedError: if the other side does not come.
    """

    serves_any_thread = True

    def __init__(
        self,
        control: ControlConnection,
        buffers: Buffers,
        store: Store,
        name: str,
        side: int,
        wire: WireDtypes = _UNROUNDED,
        late_reader: bool = False,
    ) -> None:
        super().__init__(buffers)
        self._control = control
        self._side = side
        self._late_reader = late_reader
        sent, received = (wire.parameters, wire.gradients) if side == HOLDER_SIDE else wire
        self._outgoing = _staging(buffers, sent)
        self._incoming = _staging(buffers, received)
        # torch's type stubs know only a part of this class.
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=_CONNECT_TIMEOUT_S)
        options._devices = [gloo.create_device(hostname=control.local_host)]
        try:
            self._pair: Any = gloo(PrefixStore(name, store), side, 2, options)
        except RuntimeError as error:
            raise ChannelClosedError(f"the Gloo pair {name} could not be connected: {error}") from error

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        self._control.send(message)
        if payload is None:
            return
        if self._late_reader and self._side == HOLDER_SIDE:
            wait_until_ready(self._control)
        if self._outgoing is not None:
            payload = _rounded(payload, self._outgoing[: payload.numel()])
        self._pass(self._group().send, payload)

    @override
    def receive(self) -> Message:
        return self._control.receive()

    @override
    def receive_payload(self, out: Tensor) -> None:
        if self._late_reader and self._side == WORKER_SIDE:
            say_ready(self._control)
        arriving = out if self._incoming is None else self._incoming[: out.numel()]
        self._pass(self._group().recv, arriving)
        if arriving is not out:
            out.copy_(arriving)

    @override
    def close(self) -> None:
        self._control.shutdown()
        self._control.close()
        self._pair = None

    def _group(self) -> Any:
        if self._pair is None:
            raise ChannelClosedError("channel closed")
        return self._pair

    def _pass(self, post: Callable[..., torch.distributed.Work], payload: Tensor) -> None:
        deadline_s = _PAYLOAD_BASE_S + payload.nbytes / _SLOWEST_BYTES_PER_S
        try:
            # A pair whose other side is known to be gone refuses; any other fails while it is waited for.
            post([payload], 1 - self._side, 0).wait(timedelta(seconds=deadline_s))
        except RuntimeError as error:
            # Gloo closes the pair for good on any error.
            self._pair = None
            raise ChannelClosedError(f"the payload did not pass: {error}") from error


def _staging(buffers: Buffers, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None or dtype is buffers.gradient.dtype:
        return None
    return torch.empty(buffers.gradient.numel(), dtype=dtype)


def _rounded(payload: Tensor, staging: Tensor) -> Tensor:
    if staging.dtype is torch.float16:
        # Its largest number is small enough that one large gradient would arrive as infinity and spoil the state.
        largest = torch.finfo(torch.float16).max
        payload = payload.clamp(-largest, largest)
    return staging.copy_(payload)
