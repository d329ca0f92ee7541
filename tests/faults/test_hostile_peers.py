"""Strangers that mean harm, while training goes on: nothing read, nothing changed, little taken of rank 0."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from benchmarks.hostile import ATTACKS, attack
from lightning_async import AMSGrad
from lightning_async.exchange.negotiation import dial
from lightning_async.exchange.worker import Worker
from lightning_async.runtime import listener as listener_module
from lightning_async.runtime.handshake import HEARTBEAT, _Newcomer
from lightning_async.transport.codec import HEADER_BYTES, encode
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Challenge, Goodbye, Hello, Welcome
from tests.faults.host import Host, model
from tests.harness import Call, eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host("tcp")
    yield host
    host.close()


def train(host: Host, updates: int) -> float:
    """Trains as rank 1; returns a parameter, which tells of every update."""
    parameters = model()
    channel = dial(host.listener.address, 1, host.layout, host.groups)
    worker = Worker(1, channel, host.layout, [AMSGrad(parameters)], host.latch)
    for _ in range(updates):
        worker.draw()
        worker.begin_batch(samples=1)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        worker.step(0)
    value = float(parameters[0].detach().flatten()[0])
    worker.close()
    return value


def test_a_run_under_attack_is_as_it_would_be_alone(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    alone = Host("tcp")
    expected = train(alone, updates=50)
    alone.close()
    over = threading.Event()
    threads = threading.active_count()
    address = host.listener.address
    strangers = Call(lambda: attack(address.host, address.port, over.is_set, per_second=400, slow=200))
    assert eventually(lambda: host.stats.refused > 100)

    found = train(host, updates=50)
    most_threads = threading.active_count()
    over.set()
    made = strangers.outcome()

    assert found == expected
    assert host.latch.failure is None
    assert set(made) == {*ATTACKS, "slow"}
    # The strangers' own thread, and the session's, its peer's and its worker's.
    assert most_threads <= threads + 6
    assert len(host.listener._arrivals) <= listener_module._MOST_ARRIVALS
    lines = [record for record in caplog.records if "refused a connection" in record.getMessage()]
    assert len(lines) <= 2 * listener_module._LINES_PER_MINUTE
    assert host.stats.refused > len(lines)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_of_connections_that_never_end_their_handshake_only_so_many_are_kept(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_MOST_ARRIVALS", 10)
    threads, before = threading.active_count(), descriptors()
    strangers = [host.knock(b"L") for _ in range(60)]
    assert eventually(lambda: host.stats.refused == 50)

    assert len(host.listener._arrivals) == 10
    assert threading.active_count() == threads
    assert descriptors() <= before + len(strangers) + 10
    assert train(host, updates=1) < 1.0
    for stranger in strangers:
        stranger.close()


def test_a_handshake_has_one_deadline_however_often_a_byte_comes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_TIMEOUT_S", 0.5)
    with closing(host.knock()) as stranger:

        def drip() -> None:
            for byte in b"LASY" * 100:
                stranger.send(bytes([byte]))
                time.sleep(0.05)

        with pytest.raises(OSError):  # noqa: PT011  # reset or broken pipe
            drip()

    assert host.stats.refused == 1


def test_little_is_kept_of_what_a_stranger_sends(host: Host) -> None:
    """A message longer than any handshake's is refused by its header."""
    with closing(host.knock(b"LASY" + b"\x05\x00" + b"\x01" + b"\xff" * (HEADER_BYTES - 7))) as stranger:

        def pour() -> None:
            for _ in range(1000):
                stranger.sendall(b"x" * (1 << 20))

        with pytest.raises(OSError):  # noqa: PT011  # reset or broken pipe
            pour()

    assert eventually(lambda: host.stats.refused == 1)


def test_a_rank_that_strangers_push_out_comes_in_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_MOST_ARRIVALS", 1)
    heard = listener_module.Introduction.hear
    strangers: list[Any] = []

    def hear(self: Any, message: Any) -> Any:
        answer = heard(self, message)
        if len(strangers) < 2 and isinstance(message, Hello):
            strangers.append(host.knock(b""))
            time.sleep(0.1)
        return answer

    monkeypatch.setattr(listener_module.Introduction, "hear", hear)

    assert train(host, updates=1) < 1.0
    assert len(strangers) == 2
    for stranger in strangers:
        stranger.close()


def test_a_handshake_that_was_recorded_lets_nobody_in(host: Host) -> None:
    """All that a rank has said, once more and in one piece."""
    rank = _Newcomer(host.listener.address.token, 1, HEARTBEAT, 0)
    first = ControlConnection(host.knock(encode(rank.hello)))
    challenge = first.receive()
    assert isinstance(challenge, Challenge)
    proof = rank.answer(challenge, {})
    first.send(proof)
    assert isinstance(first.receive(), Welcome)

    second = ControlConnection(host.knock(encode(rank.hello) + encode(proof)))
    assert isinstance(second.receive(), Challenge)
    reply: Any = second.receive()

    assert "does not know this run's token" in reply.reason
    assert host.stats.refused == 1
    assert host.latch.failure is None
    first.send(Goodbye(1))
    first.close()
    second.close()
