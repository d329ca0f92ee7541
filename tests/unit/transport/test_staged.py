"""Staging between a device and a host channel, with a stream that copies as late as a GPU may."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async.transport import pinning, staged
from lightning_async.transport.base import Buffers
from lightning_async.transport.fake import FakeChannel, fake_pair
from lightning_async.transport.inprocess import in_process_pair
from lightning_async.transport.message import Message, Pull
from lightning_async.transport.side_stream import SideStream
from lightning_async.transport.staged import StagedChannel, on_device

NUMEL = 6
CPU = torch.device("cpu")
PING = Pull(worker=1)


class LateStream(SideStream):
    """Makes no copy before somebody waits for it; `computes` stands for the device's own work."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], Any]] = []
        self.joined = False

    def computes(self, work: Callable[[], Any]) -> None:
        self.queued.append(work)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.queued.append(lambda: target.copy_(source))

    def join(self) -> None:
        self.joined = True

    def synchronize(self) -> None:
        while self.queued:
            self.queued.pop(0)()


class SharedEnd(FakeChannel):
    """An end whose buffers are the peer's, as over shared memory."""

    def send(self, message: Message, payload: Tensor | None = None) -> None:
        super().send(message)

    def receive_payload(self, out: Tensor) -> None:
        return


def staged_pair() -> tuple[StagedChannel, FakeChannel, LateStream]:
    shared = Buffers.allocate(NUMEL, torch.float32)
    worker, session = SharedEnd(shared), SharedEnd(shared)
    worker.join(session)
    session.join(worker)
    stream = LateStream()
    return StagedChannel(worker, CPU, stream), session, stream


def test_the_message_goes_out_when_the_gradient_is_on_the_host() -> None:
    worker, session, stream = staged_pair()
    # The backward pass, still running when the push is called for.
    stream.computes(lambda: worker.buffers.gradient.fill_(3.0))

    worker.send(PING, worker.buffers.gradient[1:4])

    session.receive()
    assert session.buffers.gradient.tolist() == [0, 3, 3, 3, 0, 0]


def test_what_is_computed_next_waits_for_the_parameters() -> None:
    worker, session, stream = staged_pair()
    session.buffers.parameters.fill_(5.0)
    session.send(PING, session.buffers.parameters)
    worker.receive()

    worker.receive_payload(worker.buffers.parameters)

    assert stream.joined
    stream.synchronize()
    assert worker.buffers.parameters.tolist() == [5.0] * NUMEL


def test_no_request_goes_out_while_the_last_landing_still_reads_the_shared_buffer() -> None:
    worker, session, stream = staged_pair()
    session.buffers.parameters.fill_(5.0)
    session.send(PING, session.buffers.parameters)
    worker.receive()
    worker.receive_payload(worker.buffers.parameters)

    worker.send(PING)
    # The holder may answer by now.
    session.receive()
    session.buffers.parameters.fill_(9.0)
    stream.synchronize()

    assert worker.buffers.parameters.tolist() == [5.0] * NUMEL


def test_both_ends_may_be_staged_over_a_channel_that_copies() -> None:
    ours, theirs = fake_pair(NUMEL)
    worker, session = StagedChannel(ours, CPU), StagedChannel(theirs, CPU)
    worker.buffers.gradient.copy_(torch.arange(6.0))

    worker.send(PING, worker.buffers.gradient[2:])
    session.receive()
    session.receive_payload(session.buffers.gradient[2:])
    session.buffers.parameters.copy_(session.buffers.gradient * 2)
    session.send(PING, session.buffers.parameters)
    worker.receive()
    worker.receive_payload(worker.buffers.parameters)

    assert worker.buffers.parameters.tolist() == [0, 0, 4, 6, 8, 10]


def test_rank_0s_own_worker_is_served_in_its_thread_through_staging() -> None:
    mine, theirs, serve_with = in_process_pair(Buffers.allocate(NUMEL, torch.float32))
    worker = StagedChannel(mine, CPU)
    served = []

    def serve() -> None:
        served.append((theirs.receive(), threading.current_thread()))
        theirs.buffers.parameters.copy_(theirs.buffers.gradient + 1)
        theirs.send(PING, theirs.buffers.parameters)

    serve_with(serve)
    worker.buffers.gradient.fill_(1.0)
    worker.send(PING, worker.buffers.gradient)
    worker.receive()
    worker.receive_payload(worker.buffers.parameters)

    assert worker.buffers.parameters.tolist() == [2.0] * NUMEL
    assert served == [(PING, threading.current_thread())]


def test_a_payload_that_is_not_a_part_of_a_buffer_is_refused() -> None:
    worker, _, _ = staged_pair()

    with pytest.raises(ValueError, match="part of one of the channel's buffers"):
        worker.send(PING, torch.zeros(NUMEL))


def test_a_channel_on_the_right_device_is_left_alone() -> None:
    ours, theirs = fake_pair(NUMEL)

    assert on_device(ours, CPU) is ours
    elsewhere = on_device(theirs, torch.device("meta"))
    assert isinstance(elsewhere, StagedChannel)
    assert elsewhere.buffers.gradient.device.type == "meta"


class Cudart:
    """Keeps what is registered; knows a limit, as the system does."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        if sum(self.registered.values()) + size > self.limit:
            return 2
        self.registered[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        return 0 if self.registered.pop(pointer, None) else 1


@pytest.mark.parametrize(("limit", "pinned"), [(1000, 2), (4 * NUMEL, 1), (0, 0)])
def test_host_buffers_are_pinned_where_they_are_and_released_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: int, pinned: int
) -> None:
    cudart = Cudart(limit)
    monkeypatch.setattr(pinning, "_cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    worker, session, _ = staged_pair()
    held = dict(cudart.registered)

    with caplog.at_level("WARNING"):
        worker.close()
        worker.close()

    whole = [session.buffers.gradient, session.buffers.parameters]
    assert held == {tensor.data_ptr(): 4 * NUMEL for tensor in whole[:pinned]}
    assert cudart.registered == {}
    assert caplog.text == ""


def test_nothing_is_pinned_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert staged.pin(torch.zeros(3)) is False
