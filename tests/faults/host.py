"""Rank 0 without a trainer, for what can be tried at its listener."""

from __future__ import annotations

import socket
from typing import Any, Literal

import torch

from lightning_async import AMSGrad
from lightning_async.data.ledger import Ledger
from lightning_async.exchange.negotiation import dial
from lightning_async.exchange.server import Server
from lightning_async.exchange.worker import Worker
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout, describe_model
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch
from lightning_async.runtime.handshake import CONTROL, _Newcomer
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener
from lightning_async.transport.codec import encode
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Challenge

RANKS = 3


class Host:
    """Rank 0 without a trainer: a listener, a server and its holder, in this process.

    Args:
        transport: the strategy's argument.
        slots: of each rank.
        address: where its listener is.
        timeout_s: `worker_timeout`.
        numel: size of a third parameter.
        wire: what gradients and parameters are rounded to.
    """

    def __init__(
        self,
        transport: Literal["auto", "tcp"] = "auto",
        slots: int = 1,
        address: str = "127.0.0.1",
        timeout_s: float = 30.0,
        numel: int = 0,
        wire: Any = ("fp32", "fp32"),
    ) -> None:
        self.numel = numel
        self.parameters = model(numel)
        optimizer = AMSGrad(self.parameters, lr=0.1)
        self.layout = FlatLayout([self.parameters])
        self.groups = [HyperparamLayout(optimizer)]
        self.hyperparams = self.groups[0].read(optimizer.param_groups)
        self.latch = FailureLatch()
        self.stats = RunStats(RANKS)
        self.heartbeats = Heartbeats(0, self.latch, timeout_s)
        self.listener = Listener(address, RANKS, self.heartbeats, timeout_s)
        self.ledger = Ledger(RANKS)
        self.ledger.begin_epoch(range(100))
        self.ledger.open(100)
        self.holder = Holder(self.layout, self.layout.buffer(), [optimizer], StalenessBarrier(None), self.latch)
        self.server = Server(
            self.holder,
            self.ledger,
            self.layout,
            self.groups,
            self.latch,
            self.listener,
            transport,
            self.stats.refuse,
            workers=RANKS,
            slots=slots,
            wire=wire,
        )

    def close(self) -> None:
        self.server.close(timeout_s=2.0)
        self.listener.close()
        self.heartbeats.close()

    def claims(self, **changes: Any) -> dict[str, Any]:
        """What a rank says of itself when it comes in."""
        model = describe_model(self.layout, self.groups) | changes.pop("model", {})
        return {"model": model} | changes

    def introduce(
        self, claims: dict[str, Any], rank: int = 1, role: str = CONTROL, token: str | None = None
    ) -> ControlConnection:
        """A connection to the listener that has proven to know the run's token, and waits for the answer."""
        newcomer = _Newcomer(token or self.listener.address.token, rank, role, 0)
        connection = ControlConnection(self.knock(encode(newcomer.hello)))
        connection.settimeout(5.0)
        challenge = connection.receive()
        assert isinstance(challenge, Challenge)
        if token is not None:
            # It does not care who answers.
            newcomer._token = self.listener.address.token
            proof = newcomer.answer(challenge, claims)
            connection.send(proof._replace(text="0" * 64 + proof.text[64:]))
        else:
            connection.send(newcomer.answer(challenge, claims))
        return connection

    def knock(self, data: bytes = b"") -> socket.socket:
        """A connection to the listener that has sent ``data``."""
        sock = socket.create_connection((self.listener.address.host, self.listener.address.port), timeout=5.0)
        sock.sendall(data)
        return sock

    def serves(self, rank: int) -> bool:
        """Whether a rank of the run is still served."""
        channel = dial(self.listener.address, rank, self.layout, self.groups)
        worker = Worker(rank, channel, self.layout, [AMSGrad(model(self.numel))], self.latch)
        drawn = worker.draw()
        worker.refresh()
        worker.close()
        return len(drawn) == 1


def model(numel: int = 0) -> list[torch.nn.Parameter]:
    more = [torch.nn.Parameter(torch.ones(numel))] if numel else []
    return [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4)), *more]
