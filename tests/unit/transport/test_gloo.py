"""Payloads over Gloo, between two threads: rounded on the way or not, and never infinite for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lightning_async.transport import gloo
from lightning_async.transport.base import Buffers, ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.gloo import HOLDER_SIDE, WORKER_SIDE, GlooChannel, WireDtypes
from lightning_async.transport.message import Parameters, Push
from tests.harness import socket_pair

pytestmark = pytest.mark.timeout(60)
NUMEL = 1000


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[GlooChannel, GlooChannel]]:
    """The worker's and the holder's end of a channel that rounds as the parameter says."""
    near, far = map(ControlConnection, socket_pair())
    store, ends = HashStore(), {}

    def connect(side: int, control: ControlConnection) -> None:
        buffers = Buffers.allocate(NUMEL, torch.float32)
        wire, late_reader = request.param if type(request.param) is tuple else (request.param, False)
        ends[side] = GlooChannel(control, buffers, store, "pair", side, wire, late_reader)

    thread = threading.Thread(target=connect, args=(HOLDER_SIDE, far))
    thread.start()
    connect(WORKER_SIDE, near)
    thread.join(30)
    yield ends[WORKER_SIDE], ends[HOLDER_SIDE]
    for end in ends.values():
        end.close()


def pass_on(sender: GlooChannel, receiver: GlooChannel, payload: Tensor, out: Tensor) -> None:
    message = Push(worker=1) if sender.buffers.gradient is payload else Parameters(worker=1)
    thread = threading.Thread(target=sender.send, args=(message, payload))
    thread.start()
    assert type(receiver.receive()) is type(message)
    receiver.receive_payload(out)
    thread.join(30)


@pytest.mark.parametrize(
    ("pair", "gradients", "parameters"),
    [
        (WireDtypes(), torch.float32, torch.float32),
        (WireDtypes(torch.float32, torch.float32), torch.float32, torch.float32),
        (WireDtypes(torch.bfloat16), torch.bfloat16, torch.float32),
        (WireDtypes(torch.float16, torch.bfloat16), torch.float16, torch.bfloat16),
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


@pytest.mark.parametrize("pair", [WireDtypes(torch.float16)], indirect=True)
def test_a_gradient_too_large_for_fp16_arrives_as_its_largest_number(pair: Any) -> None:
    worker, holder = pair
    worker.buffers.gradient.fill_(1e6)
    worker.buffers.gradient[0] = -1e6

    part = worker.buffers.gradient[:10]
    thread = threading.Thread(target=worker.send, args=(Push(worker=1), part))
    thread.start()
    holder.receive()
    holder.receive_payload(holder.buffers.gradient[:10])
    thread.join(30)

    assert holder.buffers.gradient[:10].tolist() == [-65504.0] + [65504.0] * 9
    assert not holder.buffers.gradient[10:].any()


@pytest.mark.parametrize("pair", [(WireDtypes(), True)], indirect=True)
def test_parameters_wait_for_a_worker_that_computes_longer_than_a_payload_may_take(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, holder = pair
    monkeypatch.setattr(gloo, "_PAYLOAD_BASE_S", 1.0)
    holder.buffers.parameters.fill_(3.0)
    thread = threading.Thread(target=holder.send, args=(Parameters(worker=1), holder.buffers.parameters))
    thread.start()
    time.sleep(1.5)

    assert isinstance(worker.receive(), Parameters)
    worker.receive_payload(worker.buffers.parameters)
    thread.join(30)

    assert worker.buffers.parameters.eq(3.0).all()


@pytest.mark.parametrize("pair", [(WireDtypes(), True)], indirect=True)
def test_a_worker_that_ends_before_it_takes_its_parameters_is_noticed_at_once(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, holder = pair
    # Whoever waited for the payload's own time-out would meet that of this test.
    monkeypatch.setattr(gloo, "_PAYLOAD_BASE_S", 3600.0)
    threading.Timer(0.1, worker.close).start()

    with pytest.raises(ChannelClosedError):
        holder.send(Parameters(worker=1), holder.buffers.parameters)


@pytest.mark.parametrize("pair", [WireDtypes()], indirect=True)
@pytest.mark.parametrize("sends", [True, False])
def test_a_pair_that_is_known_to_be_gone_is_a_closed_channel_too(pair: Any, sends: bool) -> None:
    worker, holder = pair
    worker._pair = None
    # Until Gloo's own thread has seen the end of the connection, there is a pair to be waited for.
    time.sleep(0.3)
    send = partial(holder.send, Parameters(worker=1), holder.buffers.parameters)
    receive = partial(holder.receive_payload, holder.buffers.gradient)

    with pytest.raises(ChannelClosedError, match="the payload did not pass"):
        (send if sends else receive)()
