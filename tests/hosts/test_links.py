"""Slow and cut links between two hosts: what moves is alive, and a cut shorter than worker_timeout is survived."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from lightning_async import AMSGrad
from lightning_async.exchange.negotiation import dial
from lightning_async.exchange.worker import Worker
from lightning_async.runtime.failure import FailureLatch, WorkerFailedError
from lightning_async.runtime.handshake import HEARTBEAT, handshake
from lightning_async.runtime.heartbeat import Heartbeats
from tests.faults.host import Host, model
from tests.harness import Call, eventually
from tests.hosts.network import Link, two_hosts

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def link() -> Iterator[Link]:
    with two_hosts() as link:
        yield link


class Run:
    """Rank 0 on host a and rank 1 on host b, each with its heartbeat."""

    def __init__(self, link: Link, timeout_s: float, numel: int, address: str = "10.77.0.1") -> None:
        self.host = link.a.run(lambda: Host(address=address, timeout_s=timeout_s, numel=numel, transport="tcp"))
        self.latch = FailureLatch()
        self.heartbeats = link.b.run(lambda: Heartbeats(1, self.latch, timeout_s))
        self.parameters = model(numel)
        found = self.host.listener.address
        self.heartbeats.add(0, link.b.run(lambda: handshake(found, 1, HEARTBEAT)[0]))
        channel = link.b.run(lambda: dial(found, 1, self.host.layout, self.host.groups))
        self.worker = Worker(1, channel, self.host.layout, [AMSGrad(self.parameters)], self.latch)

    def train(self, updates: int) -> None:
        for _ in range(updates):
            self.worker.draw()
            self.worker.begin_batch(samples=1)
            for parameter in self.parameters:
                parameter.grad = torch.ones_like(parameter)
            self.worker.step(0)

    def close(self) -> None:
        self.worker.close()
        self.heartbeats.close()
        self.host.close()


def test_a_payload_that_takes_longer_than_worker_timeout_is_passed(link: Link) -> None:
    """Heartbeats go beside it over the same thin link."""
    run = Run(link, timeout_s=1.0, numel=400_000)
    link.limit(megabits=6)
    started = time.monotonic()

    run.train(updates=1)

    assert time.monotonic() - started > 3.0
    assert run.host.latch.failure is run.latch.failure is None
    assert run.host.holder.version == 1
    run.close()


def survive(link: Link, cut_s: float, timeout_s: float, unplugged: bool = False) -> None:
    run = Run(link, timeout_s, numel=200_000)
    link.limit(megabits=20)
    training = Call(lambda: run.train(updates=8))
    assert eventually(lambda: run.host.holder.version >= 2)
    (link.unplug if unplugged else link.cut)()
    time.sleep(cut_s)
    assert training.is_alive()
    (link.plug if unplugged else link.mend)()

    assert training.ended(timeout_s + 30) is None
    assert run.host.latch.failure is run.latch.failure is None
    assert run.host.holder.version == 8
    run.close()


@pytest.mark.parametrize("unplugged", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_cut_in_the_middle_of_a_payload_is_survived(link: Link, unplugged: bool) -> None:
    survive(link, cut_s=1.5, timeout_s=4.0, unplugged=unplugged)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("unplugged", [False, True])
@pytest.mark.parametrize("cut_s", [2, 5, 10, 30, 50])
def test_cuts_of_all_lengths_below_worker_timeout_are_survived(link: Link, cut_s: float, unplugged: bool) -> None:
    survive(link, cut_s, timeout_s=60.0, unplugged=unplugged)


def test_a_cut_longer_than_worker_timeout_ends_the_run_by_name_on_both_sides(link: Link) -> None:
    run = Run(link, timeout_s=1.0, numel=200_000)
    training = Call(lambda: run.train(updates=1000))
    assert eventually(lambda: run.host.holder.version >= 2)

    link.cut()

    for latch, lost in ((run.latch, 0), (run.host.latch, 1)):
        failure = latch.wait(20.0)
        assert failure is not None
        assert failure.rank == lost
        assert "for 1 s (worker_timeout)" in failure.reason
    # The trainer's guard ends a process whose main thread waits for what will not come.
    run.worker.close()
    assert isinstance(training.ended(), WorkerFailedError)
    run.close()
