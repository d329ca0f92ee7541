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
from lightning_async.runtime.handshake import CONTROL
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.listener import Listener

RANKS = 3


class Host:
    """Rank 0 without a trainer: a listener, a server and its holder, in this process."""

    def __init__(self, transport: Literal["auto", "gloo"] = "auto", slots: int = 1) -> None:
        self.parameters = model()
        optimizer = AMSGrad(self.parameters, lr=0.1)
        self.layout = FlatLayout([self.parameters])
        self.groups = [HyperparamLayout(optimizer)]
        self.hyperparams = self.groups[0].read(optimizer.param_groups)
        self.latch = FailureLatch()
        self.stats = RunStats(RANKS)
        self.heartbeats = Heartbeats(0, self.latch, timeout_s=30.0)
        self.listener = Listener("127.0.0.1", RANKS, self.heartbeats)
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
        )

    def close(self) -> None:
        self.server.close(timeout_s=2.0)
        self.listener.close()
        self.heartbeats.close()

    def hello(self, role: str = CONTROL, **changes: Any) -> dict[str, Any]:
        """What a rank says when it comes in."""
        model = describe_model(self.layout, self.groups) | changes.pop("model", {})
        return {"token": self.listener.address.token, "role": role, "model": model} | changes

    def knock(self, data: bytes = b"") -> socket.socket:
        """A connection to the listener that has sent ``data``."""
        sock = socket.create_connection((self.listener.address.host, self.listener.address.port), timeout=5.0)
        sock.sendall(data)
        return sock

    def serves(self, rank: int) -> bool:
        """Whether a rank of the run is still served."""
        channel = dial(self.listener.address, rank, self.layout, self.groups)
        worker = Worker(rank, channel, self.layout, [AMSGrad(model())], self.latch)
        drawn = worker.draw()
        worker.refresh()
        worker.close()
        return len(drawn) == 1


def model() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
