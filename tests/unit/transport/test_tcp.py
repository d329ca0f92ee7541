"""Payloads over TCP, between two threads: rounded on the way or not, for as long as bytes move, and never infinite."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async.transport.base import Buffers, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Parameters, Push, Read
from lightning_async.transport.tcp import TcpChannel
from lightning_async.transport.wire import PLAIN, RoundedWire, Wire
from tests.harness import Call, socket_pair

pytestmark = pytest.mark.timeout(60)
NUMEL = 1000
WIRES: dict[str, Any] = {
    "fp32": lambda numel: PLAIN,
    **{name: partial(RoundedWire, dtype=dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))},
}


def channels(
    gradients: str = "fp32", parameters: str = "fp32", stall_s: float = 30.0, late: bool = False, numel: int = NUMEL
) -> tuple[TcpChannel, TcpChannel]:
    """The worker's and the holder's end of a channel that rounds as told."""
    near, far = map(ControlConnection, socket_pair())

    def wires() -> list[Wire]:
        return [WIRES[name](numel) for name in (gradients, parameters)]

    mine, theirs = (Buffers.allocate(numel, torch.float32) for _ in range(2))
    worker = TcpChannel(near, mine, stall_s, *wires(), late_reader=late)
    return worker, TcpChannel(far, theirs, stall_s, *reversed(wires()), serves=True, late_reader=late)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[TcpChannel, TcpChannel]]:
    worker, holder = channels(**getattr(request, "param", {}))
    yield worker, holder
    worker.close()
    holder.close()


def pass_on(sender: TcpChannel, receiver: TcpChannel, payload: Tensor, out: Tensor) -> None:
    message = Push(worker=1) if sender.buffers.gradient is payload else Parameters(worker=1)
    sending = Call(lambda: sender.send(message, payload))
    assert type(receiver.receive()) is type(message)
    receiver.receive_payload(out)
    sending.outcome()


@pytest.mark.parametrize(
    ("pair", "gradients", "parameters"),
    [
        ({}, torch.float32, torch.float32),
        ({"gradients": "bf16"}, torch.bfloat16, torch.float32),
        ({"gradients": "fp16", "parameters": "bf16"}, torch.float16, torch.bfloat16),
    ],
    indirect=["pair"],
)
def test_each_direction_is_rounded_to_its_own_dtype(pair: Any, gradients: torch.dtype, parameters: torch.dtype) -> None:
    worker, holder = pair
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    worker.buffers.gradient.copy_(values)
    holder.buffers.parameters.copy_(values)

    pass_on(worker, holder, worker.buffers.gradient, holder.buffers.gradient)
    pass_on(holder, worker, holder.buffers.parameters, worker.buffers.parameters)

    assert torch.equal(holder.buffers.gradient, values.to(gradients).float())
    assert torch.equal(worker.buffers.parameters, values.to(parameters).float())
    # What is sent stays as it was.
    assert torch.equal(worker.buffers.gradient, values)
    assert worker.wire_bytes == holder.wire_bytes == NUMEL * (gradients.itemsize + parameters.itemsize)


@pytest.mark.parametrize("pair", [{"parameters": "bf16"}], indirect=True)
def test_parameters_that_are_read_past_the_barrier_are_the_holders_own(pair: Any) -> None:
    worker, holder = pair
    holder.buffers.parameters.copy_(torch.randn(NUMEL))

    worker.send(Read(worker=1))
    holder.receive()
    pass_on(holder, worker, holder.buffers.parameters, worker.buffers.parameters)

    assert torch.equal(worker.buffers.parameters, holder.buffers.parameters)


@pytest.mark.parametrize("pair", [{"gradients": "fp16"}], indirect=True)
def test_a_gradient_too_large_for_fp16_arrives_as_its_largest_number(pair: Any) -> None:
    worker, holder = pair
    worker.buffers.gradient.fill_(1e6)
    worker.buffers.gradient[0] = -1e6

    sending = Call(lambda: worker.send(Push(worker=1), worker.buffers.gradient[:10]))
    holder.receive()
    holder.receive_payload(holder.buffers.gradient[:10])
    sending.outcome()

    assert holder.buffers.gradient[:10].tolist() == [-65504.0] + [65504.0] * 9
    assert not holder.buffers.gradient[10:].any()


@pytest.mark.parametrize("pair", [{"late": True, "stall_s": 0.2}], indirect=True)
def test_parameters_wait_for_a_worker_that_computes_longer_than_a_payload_may_stand_still(pair: Any) -> None:
    worker, holder = pair
    holder.buffers.parameters.fill_(3.0)
    sending = Call(lambda: holder.send(Parameters(worker=1), holder.buffers.parameters))
    assert isinstance(worker.receive(), Parameters)
    time.sleep(0.5)

    worker.receive_payload(worker.buffers.parameters)
    sending.outcome()

    assert worker.buffers.parameters.eq(3.0).all()


@pytest.mark.parametrize("pair", [{"late": True, "stall_s": 3600.0}], indirect=True)
def test_a_worker_that_ends_before_it_takes_its_parameters_is_noticed_at_once(pair: Any) -> None:
    worker, holder = pair
    threading.Timer(0.1, worker.close).start()

    with pytest.raises(ChannelClosedError):
        holder.send(Parameters(worker=1), holder.buffers.parameters)


LARGE = 4 << 20


@pytest.mark.parametrize("pair", [{"stall_s": 3600.0, "numel": LARGE}], indirect=True)
@pytest.mark.parametrize("sends", [True, False])
def test_a_peer_that_ends_in_the_middle_of_a_payload_is_noticed_at_once(pair: Any, sends: bool) -> None:
    """No buffer of the system is large enough for the payload."""
    worker, holder = pair
    if sends:
        passing = Call(lambda: holder.send(Parameters(worker=1), holder.buffers.parameters))
        worker.receive()
    else:
        passing = Call(lambda: holder.receive_payload(holder.buffers.gradient))
        worker._control._socket.sendall(b"a part of it")
    assert passing.waits()
    worker.close()

    error = passing.ended()
    assert isinstance(error, ChannelClosedError)
    assert "::" not in str(error)
    assert "connection" in str(error)


@pytest.mark.parametrize("pair", [{"stall_s": 0.2, "numel": LARGE}], indirect=True)
@pytest.mark.parametrize("sends", [True, False])
def test_a_payload_that_stands_still_for_the_timeout_is_given_up(pair: Any, sends: bool) -> None:
    worker, holder = pair
    if sends:
        passing = Call(lambda: holder.send(Parameters(worker=1), holder.buffers.parameters))
    else:
        passing = Call(lambda: holder.receive_payload(holder.buffers.gradient))
        worker._control._socket.sendall(b"a part of it")

    error = passing.ended()
    assert isinstance(error, ChannelClosedError)
    assert str(error) == "no byte of a payload has moved for 0.2 s (worker_timeout)"


@pytest.mark.parametrize("sends", [True, False])
def test_a_payload_may_take_many_timeouts_while_its_bytes_move(sends: bool) -> None:
    worker, holder = channels(stall_s=0.4, numel=LARGE)
    thin: socket.socket = worker._control._socket
    size = holder.buffers.gradient.nbytes
    values = torch.arange(LARGE, dtype=torch.float32)
    holder.buffers.parameters.copy_(values)
    if sends:
        # Both buffers hold less than the payload, so it moves at the reader's pace.
        passing = Call(lambda: holder.send(Parameters(worker=1), holder.buffers.parameters))
        worker.receive()
    else:
        passing = Call(lambda: holder.receive_payload(holder.buffers.gradient))

    started, moved = time.monotonic(), 0
    data, arrived = values.numpy().tobytes(), bytearray()
    while moved < size:
        if sends:
            arrived += thin.recv(min(size // 10, size - moved), socket.MSG_WAITALL)
            moved = len(arrived)
        else:
            moved += thin.send(data[moved : moved + size // 10])
        time.sleep(0.1)

    assert passing.ended() is None
    assert time.monotonic() - started > 0.8
    assert arrived == data if sends else torch.equal(holder.buffers.gradient, values)
    worker.close()
    holder.close()


def test_a_pair_that_is_closed_from_here_is_a_closed_channel() -> None:
    worker, holder = channels()
    holder.close()

    for act in (
        lambda: holder.send(Parameters(worker=1), holder.buffers.parameters),
        lambda: holder.receive_payload(holder.buffers.gradient),
    ):
        with pytest.raises(ChannelClosedError):
            act()
    worker.close()
