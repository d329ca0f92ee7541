"""What is said to CUDA and NCCL, by stand-ins that keep the order; what they make of it is for tests/gpu.

The stand-ins' streams compute nothing: an event knows what had been queued on its stream when it was recorded, and a
stream what it has to wait for.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, ProcessGroupGloo

from lightning_async.holder.placement import CudaHolderStream, HolderPlacement
from lightning_async.transport.fake import fake_pair
from lightning_async.transport.nccl import NcclCommunicator, NcclExecutor
from lightning_async.transport.side_stream import CudaSideStream, ImmediateStream, side_stream

CPU = torch.device("cpu")
GPU = torch.device("cuda", 1)


class Stream:
    def __init__(self, device: Any = None, name: str = "") -> None:
        self.device, self.name = device, name or f"stream {id(self)}"
        self.did: list[str] = []

    def wait_event(self, event: Event) -> None:
        self.did.append(f"waits for {event.stream.name} at {event.at}")

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self.blocking = blocking

    def record(self, stream: Stream) -> None:
        self.stream, self.at = stream, len(stream.did)

    def synchronize(self) -> None:
        assert self.blocking, "a thread that waits must sleep"
        self.stream.did.append("the host waits")


class Cuda:
    """Takes the place of the part of ``torch.cuda`` that is used; what is current is so for a thread."""

    def __init__(self) -> None:
        self.local = threading.local()

    def current_stream(self, device: Any = None) -> Stream:
        if not hasattr(self.local, "stream"):
            self.local.stream = Stream(device, threading.current_thread().name)
        return self.local.stream  # type: ignore[no-any-return]

    def set_stream(self, stream: Stream) -> None:
        self.local.stream = stream

    def set_device(self, device: Any) -> None:
        self.local.device = device

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self.local.stream = stream
        yield
        self.local.stream = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name in ("current_stream", "set_stream", "set_device", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return fake


class Noting(Tensor):
    """A host tensor that notes on the current stream that it is written to."""

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        assert non_blocking, "a copy beside the computation must not wait for it"
        torch.cuda.current_stream().did.append("copies")  # type: ignore[attr-defined]
        return super().copy_(source)


def test_copies_are_made_beside_the_computation_and_in_order_with_it(cuda: Cuda) -> None:
    computing = cuda.current_stream()
    computing.did.append("computes")
    stream = CudaSideStream(GPU)
    target = torch.zeros(2).as_subclass(Noting)

    stream.copy(target, torch.ones(2))
    stream.join()
    stream.synchronize()

    assert stream._stream.did == [f"waits for {computing.name} at 1", "copies", "the host waits"]
    assert computing.did == ["computes", f"waits for {stream._stream.name} at 2"]
    assert cuda.current_stream() is computing


def test_a_device_without_streams_copies_at_once() -> None:
    target = torch.zeros(2)

    stream = side_stream(CPU)
    stream.copy(target, torch.ones(2))

    assert isinstance(stream, ImmediateStream)
    assert target.tolist() == [1, 1]


def test_the_holders_lane_waits_for_nothing_of_the_caller_but_the_caller_for_the_lane(cuda: Cuda) -> None:
    computing = cuda.current_stream()
    computing.did.append("computes")
    stream = CudaHolderStream(GPU)

    with stream.entered():
        inside = cuda.current_stream()
        inside.did.append("updates")
        with stream.entered():
            inside.did.append("copies")

    assert inside is stream._stream
    # Had the holder's stream waited for the caller's stream, every other worker's update would have, too.
    assert inside.did == ["updates", "copies"]
    assert computing.did == ["computes", "the host waits", f"waits for {inside.name} at 2"]
    assert cuda.current_stream() is computing


def test_a_session_on_a_gpu_has_its_device_and_a_stream_of_its_own(cuda: Cuda) -> None:
    training = cuda.current_stream()
    placement = HolderPlacement(GPU, {"uuid": "GPU-1"})
    seen: list[Any] = []

    def session() -> None:
        placement.bind_thread()
        seen.extend([cuda.local.device, cuda.current_stream()])

    thread = threading.Thread(target=session)
    thread.start()
    thread.join()

    device, stream = seen
    assert device == GPU
    assert stream not in (training, placement._stream._stream)  # type: ignore[union-attr]


def test_a_holder_on_the_host_needs_nothing_of_its_sessions() -> None:
    placement = HolderPlacement()

    placement.bind_thread()

    channel, _ = fake_pair(3)
    assert placement.stage(channel, 1) is channel


class Group:
    """ProcessGroupNCCL's methods, over Gloo; notes what it is asked and on which stream."""

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream

    made: list[Group]

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
        assert os.environ["TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"] == "false"
        assert options._timeout.total_seconds() > 1000
        self.place = (store, rank, size)
        self.did: list[str] = []
        Group.made.append(self)

    def eager_connect_single_device(self, device: torch.device) -> None:
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self.pair = gloo(*self.place, options)
        self.did.append(f"connects {device}")

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        torch.cuda.current_stream().did.append("sends")  # type: ignore[attr-defined]
        return self.pair.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        torch.cuda.current_stream().did.append("receives")  # type: ignore[attr-defined]
        return self.pair.recv(tensors, peer, tag)

    def abort(self) -> None:
        self.did.append("aborted")


@pytest.mark.timeout(60)
def test_a_communicator_sends_behind_what_has_been_computed_and_from_one_thread(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    Group.made = []
    store = HashStore()
    communicators = [NcclCommunicator(store, "pair", side, CPU) for side in (0, 1)]
    links = [NcclExecutor(communicator, f"side-{side}") for side, communicator in enumerate(communicators)]
    computing = cuda.current_stream()
    computing.did.append("computes")
    received = torch.zeros(3)

    def connect(executor: NcclExecutor) -> None:
        executor.connect(20.0, lambda: False)

    def receive() -> None:
        connect(links[1])
        links[1].receive(received, lambda: False)

    other = threading.Thread(target=receive, name="other")
    other.start()
    connect(links[0])
    links[0].send(torch.arange(3.0), lambda: False)
    other.join(20)
    first = communicators[0]._stream
    for executor in links:
        executor.abort()
        executor.abort()

    assert received.tolist() == [0, 1, 2]
    assert first is not computing
    # The first exchange shows that the pair works.
    assert first.did == ["sends", "receives", "the host waits", "waits for MainThread at 1", "sends", "the host waits"]
    assert [sorted(group.did) for group in Group.made] == [["aborted", "connects cpu"]] * 2
    assert not [name for name in os.environ if name.startswith("TORCH_NCCL_")]


def test_a_communicator_that_is_aborted_before_it_connects_never_does(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    communicator = NcclCommunicator(HashStore(), "pair", 0, CPU)

    communicator.abort()

    with pytest.raises(ConnectionError, match="aborted"):
        communicator.connect()
