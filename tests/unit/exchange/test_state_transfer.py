"""An optimizer's state reaches any rank that asks for it, whatever is in it, and whoever else is at the listener."""

from __future__ import annotations

import socket
import threading
from typing import Any, cast

import pytest
import torch

from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.state_transfer import fetch_state, send_state
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch
from lightning_async.runtime.handshake import STATE, Address, HandshakeError, handshake
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Welcome
from tests.harness import Entrance


class Door:
    """Rank 0 of two, with a holder that has made no step yet, and a state to ask for."""

    def __init__(self, state: Any) -> None:
        latch = FailureLatch()
        self.entrance = Entrance(2, latch)
        self.listener = self.entrance.listener
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        self.optimizer.state[self.optimizer.param_groups[0]["params"][0]] = state
        self.engine = Engine(
            rank=0,
            world_size=2,
            optimizers=[self.optimizer],
            options=ExchangeOptions(),
            latch=latch,
            listener=self.listener,
            stats=RunStats(2),
            observers=[],
            version=0,
            meet=str,
        )

    def close(self) -> None:
        self.engine.close()
        self.entrance.close()


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Any:
    made = Door(getattr(request, "param", {"momentum_buffer": torch.full((2,), 0.5)}))
    yield made
    made.close()


def test_a_rank_that_asks_gets_it(listener: Door) -> None:
    state = fetch_state(listener.listener.address, 1, 0)

    assert state[0]["momentum_buffer"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("index", [1, -1, "0", None])
def test_who_asks_for_another_optimizer_is_refused(listener: Door, index: Any) -> None:
    with pytest.raises(HandshakeError, match="it asks for the state of optimizer"):
        handshake(listener.listener.address, 1, STATE, optimizer=index)


@pytest.mark.parametrize("listener", [{"generator": torch.Generator()}], indirect=True)
def test_what_cannot_be_sent_is_named(listener: Door) -> None:
    with pytest.raises(HandshakeError, match=r"has a Generator in it.*read it on rank 0"):
        fetch_state(listener.listener.address, 1, 0)


def test_nobody_answers_after_training(listener: Door) -> None:
    listener.engine.close()

    with pytest.raises(HandshakeError, match="no training is under way"):
        fetch_state(listener.listener.address, 1, 0)


@pytest.mark.parametrize("answer", [b"{", b'{"tensor": "torch.who", "shape": [1]}', b'{"set": []}', b'{"items": [1]}'])
def test_an_answer_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    mine, theirs = socket.socketpair()
    connection = ControlConnection(mine)
    monkeypatch.setattr(
        "lightning_async.exchange.state_transfer.handshake", lambda *args, **claims: (connection, str(len(answer)))
    )
    with theirs:
        theirs.sendall(answer)

        with pytest.raises(WireError):
            fetch_state(Address("127.0.0.1", 1, ""), 1, 0)


def test_a_large_state_is_sent_while_it_is_received() -> None:
    mine, theirs = socket.socketpair()
    state = {0: {"exp_avg": torch.randn(1 << 20)}}
    sending = threading.Thread(target=send_state, args=(ControlConnection(theirs), lambda: state))
    sending.start()
    connection = ControlConnection(mine)
    connection.settimeout(30.0)
    size = int(cast(Welcome, connection.receive()).offer)
    text = bytearray(size)
    connection.receive_bytes(memoryview(text))
    data = bytearray(4 << 20)
    connection.receive_bytes(memoryview(data))
    sending.join(30.0)
    connection.close()

    assert torch.equal(torch.frombuffer(data, dtype=torch.float32), state[0]["exp_avg"])
