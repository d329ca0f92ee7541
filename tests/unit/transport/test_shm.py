"""Shared memory between processes: mapped, released, and never left over."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from lightning_async.exchange import negotiation as channels
from lightning_async.exchange.negotiation import ChannelNegotiator
from lightning_async.runtime.handshake import HandshakeError, PeerInfo
from lightning_async.transport.shm import SharedSegment, host_identity


def _double(path: str) -> None:
    buffers = SharedSegment.attach(path, 5, torch.float32)
    buffers.parameters.copy_(buffers.gradient * 2)


def test_what_one_process_writes_the_other_reads() -> None:
    segment = SharedSegment(5, torch.float32)
    segment.buffers.gradient.copy_(torch.arange(5.0))

    process = multiprocessing.get_context("fork").Process(target=_double, args=(segment.address,))
    process.start()
    process.join(20)

    assert process.exitcode == 0
    assert segment.buffers.parameters.tolist() == [0, 2, 4, 6, 8]
    assert segment.buffers.gradient.tolist() == [0, 1, 2, 3, 4]


def test_a_released_segment_cannot_be_opened_and_still_holds_its_values() -> None:
    segment = SharedSegment(3, torch.float64)
    segment.buffers.gradient.fill_(1.0)
    address = segment.address

    segment.release()
    segment.release()

    with pytest.raises(OSError, match="No such file"):
        SharedSegment.attach(address, 3, torch.float64)
    assert segment.buffers.gradient.tolist() == [1.0] * 3


def test_a_mapped_segment_keeps_no_descriptor_open() -> None:
    """Each fit maps a segment, and a trainer that is kept keeps its mapping."""
    segment = SharedSegment(1000, torch.float32)
    before = len(os.listdir("/proc/self/fd"))

    attached = SharedSegment.attach(segment.address, 1000, torch.float32)

    assert len(os.listdir("/proc/self/fd")) == before
    segment.release()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert attached.gradient.untyped_storage().nbytes() == 4000


def test_a_segment_has_no_name_to_be_left_over() -> None:
    before = set(os.listdir("/dev/shm"))

    segment = SharedSegment(1000, torch.float32)

    assert set(os.listdir("/dev/shm")) == before
    assert os.readlink(segment.address.rpartition(":")[0]).startswith("/memfd:lightning_async")


def test_a_host_without_enough_memory_falls_back_to_tcp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, offset: int, size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    peer = PeerInfo(1, 0, {"host": host_identity()})

    with caplog.at_level("WARNING"):
        segment = ChannelNegotiator("127.0.0.1", "auto", 1 << 20, torch.float32)._segment(peer)

    assert segment is None
    assert "no 8 MiB of shared memory for rank 1: [Errno 12] Cannot allocate memory; it will use TCP" in caplog.text
    with pytest.raises(HandshakeError, match=r'transport="auto"'):
        ChannelNegotiator("127.0.0.1", "shm", 1 << 20, torch.float32)._segment(peer)


def test_a_rank_of_another_host_is_refused_if_only_shared_memory_will_do() -> None:
    stranger = PeerInfo(2, 0, {"host": "another kernel"})

    assert ChannelNegotiator("127.0.0.1", "auto", 8, torch.float32)._segment(stranger) is None
    with pytest.raises(HandshakeError, match=r'rank 2 cannot map the memory of rank 0.*transport="auto"'):
        ChannelNegotiator("127.0.0.1", "shm", 8, torch.float32).check(stranger)


def test_where_memory_cannot_be_shared_nobody_is_on_the_same_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "host_identity", lambda: "")

    assert not channels._shares_memory(PeerInfo(1, 0, {"host": ""}))
