"""What one push costs rank 0 where the workers' payloads lie in shared memory, and where the time goes.

Run ``python -m benchmarks.request``. Worker and holder take turns in one thread of one process, so nothing is waited
for and nobody else wants a core: what is left is the fused kernel, a copy of the parameters, system calls and Python.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import socket
import time
from typing import Any

import torch

from benchmarks.kernel import floor_seconds
from benchmarks.processes import SHAPES, optimizer_of
from benchmarks.record import save
from lightning_async.exchange.local_service import HolderService
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.service import HolderSpec
from lightning_async.exchange.session import Session
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.fields import pack_bitmap
from lightning_async.transport.message import Draw, Parameters, Pull, Push, Tickets
from lightning_async.transport.shm import SharedMemoryChannel, SharedSegment

_TICKETS = 10**9
_SHOWN = 12


class Exchange:
    """A worker that only sends, and rank 0's side, which serves when it is told to.

    Args:
        size: of the model.
    """

    def __init__(self, size: str) -> None:
        optimizer = optimizer_of(SHAPES[size])
        stats, workers = RunStats(2), 2
        spec = HolderSpec([optimizer], ExchangeOptions(max_staleness=None), workers, version=0)
        service = HolderService(spec, FailureLatch(), None, lambda update, tickets: stats.record(update), lambda: None)
        service.begin_epoch(range(_TICKETS))
        service.open(_TICKETS)
        layout, hyperparams = service.layout, HyperparamLayout(optimizer)
        segment = SharedSegment(layout.numel, layout.dtype)
        segment.buffers.gradient.fill_(1e-3)
        self._worker, self._holder = map(ControlConnection, socket.socketpair())
        channel = SharedMemoryChannel(self._holder, segment.buffers)
        self._session = Session(1, channel, service.holder, service.ledger, layout, [hyperparams])
        self._tickets, self._version = range(0), 0
        self._push = Push(
            worker=1,
            wants_tickets=True,
            samples=1,
            dtype=layout.dtype,
            payload_bytes=layout.segment_bytes(0),
            hyperparams=HyperparamReader(optimizer, hyperparams).packed(),
            present=pack_bitmap([True] * len(SHAPES[size])),
        )
        for request in (Draw(worker=1), Pull(worker=1)):
            self._worker.send(request)
            self.serve()
            self.take()

    def ask(self) -> None:
        """Sends a push."""
        self._worker.send(self._push._replace(version=self._version, tickets=(self._tickets,)))

    def serve(self) -> None:
        """Does what rank 0 does when there is something to read."""
        for message in self._holder.receive_available():
            for _ in self._session.serve(message):
                raise RuntimeError("nobody else is there to be waited for")

    def take(self) -> None:
        """Takes the answer."""
        answer = self._worker.receive()
        if isinstance(answer, Parameters):
            self._version = answer.version
        if isinstance(answer, (Parameters, Tickets)) and answer.tickets:
            self._tickets = answer.tickets


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="44K", choices=list(SHAPES))
    parser.add_argument("--requests", type=int, default=5000)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    kernel_s, copy_s = floor_seconds(SHAPES[arguments.size])
    exchange, durations = Exchange(arguments.size), []
    for _ in range(arguments.requests):
        exchange.ask()
        started = time.perf_counter()
        exchange.serve()
        durations.append(time.perf_counter() - started)
        exchange.take()
    request_s = sorted(durations)[len(durations) // 2]
    print(f"request {request_s * 1e6:.0f} us, kernel {kernel_s * 1e6:.0f} us, copy {copy_s * 1e6:.0f} us")
    profile = cProfile.Profile()
    for _ in range(arguments.requests):
        exchange.ask()
        profile.enable()
        exchange.serve()
        profile.disable()
        exchange.take()
    print("most of it, under cProfile (which doubles what is Python):")
    parts = _parts(profile, arguments.requests)[:_SHOWN]
    for name, microseconds in parts:
        print(f"  {microseconds:6.1f} us  {name}")
    save("request", vars(arguments), [{"request_s": request_s, "kernel_s": kernel_s, "copy_s": copy_s, "parts": parts}])


def _parts(profile: cProfile.Profile, requests: int) -> list[tuple[str, float]]:
    """Microseconds a request for each function, its callees not counted; the largest first."""
    # Typeshed knows only what it prints.
    stats: Any = vars(pstats.Stats(profile))["stats"]
    of_function = [
        (f"{os.path.basename(file)}:{function}" if line else function, own_s / requests * 1e6)
        for (file, line, function), (_, _, own_s, _, _) in stats.items()
    ]
    return sorted(of_function, key=lambda part: -part[1])


if __name__ == "__main__":
    main()
