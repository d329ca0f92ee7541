"""A holder with shards in one process: followers that do what they are told when the test wants it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_async.exchange.dial import policy_and_momentum
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import FlatLayout, all_parameters
from lightning_async.runtime.failure import FailureLatch
from lightning_async.shards.follower import unpack_spec
from lightning_async.shards.follower_host import FollowerHost
from lightning_async.shards.followers import FollowerLink, Report
from lightning_async.shards.operations import ApplyPush, Operation, Serve, is_reported
from lightning_async.shards.placement import ShardedPlacement
from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.message import Message
from lightning_async.transport.shm import SharedSegment


class FakeProcess:
    """A follower's process as a queue: what is told waits until `work`, or is done at once."""

    def __init__(self, latch: FailureLatch) -> None:
        self.name = "its process for a shard"
        self.at_once = True
        # Called when it is told of a push.
        self.on_push: Callable[[], None] = lambda: None
        self.queue: deque[tuple[int, int, Operation]] = deque()
        self._host = FollowerHost(latch)
        self._reports: dict[int, Report] = {}

    def watch(self, latch: FailureLatch, timeout_s: float) -> None:
        return

    def open(self, report: Report) -> FollowerLink:
        number = len(self._reports) + 1
        self._reports[number] = report
        return FakeLink(self, number)

    def work(self) -> None:
        """Does the next thing that it was told."""
        number, place, operation = self.queue.popleft()
        answer = None
        if isinstance(operation, Serve):
            self._host.serve(number, unpack_spec(operation.payload))
        else:
            answer = self._host.do(number, place, operation)
        if is_reported(operation):
            self._reports[number](place, answer)


class FakeLink(FollowerLink):
    """The way to a `FakeProcess`."""

    def __init__(self, process: FakeProcess, number: int) -> None:
        self.name, self._process, self._number = process.name, process, number

    @override
    def send(self, place: int, operation: Operation) -> None:
        self._process.queue.append((self._number, place, operation))
        if isinstance(operation, ApplyPush):
            self._process.on_push()
        while self._process.at_once and self._process.queue:
            self._process.work()


class RecordedChannel(Channel):
    """A worker's channel that keeps what is sent."""

    def __init__(self, buffers: Buffers) -> None:
        super().__init__(buffers)
        self.sent: list[Message] = []

    @override
    def send(self, message: Message, payload: Tensor | None = None) -> None:
        self.sent.append(message)

    @override
    def receive(self) -> Message:
        raise AssertionError("nobody receives here")

    @override
    def receive_payload(self, out: Tensor) -> None:
        raise AssertionError("nobody receives here")

    @override
    def close(self) -> None:
        return


class Rig:
    """A plain holder and one with shards, over the same parameters, with memory for each worker."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, shards: int, workers: int, options: ExchangeOptions, version: int = 0
    ) -> None:
        self.latch = FailureLatch()
        self.options, self.workers = options, workers
        self.processes = [FakeProcess(self.latch) for _ in range(shards - 1)]
        self.layout = FlatLayout([all_parameters(optimizer)])
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in all_parameters(optimizer)])
        processes: Any = self.processes
        self.placement = ShardedPlacement(processes, options, workers)
        arguments: Any = (self.layout, flat, [optimizer])
        self.plain = Holder(*arguments, self._barrier(version), self.latch, **self._rules(optimizer))
        self.sharded: Any = self.placement.make_holder(
            *arguments, self._barrier(version), self.latch, **self._rules(optimizer)
        )
        self.channels: dict[tuple[int, int], RecordedChannel] = {}

    def _barrier(self, version: int) -> StalenessBarrier:
        options = self.options
        assert options.max_staleness != "auto"
        return StalenessBarrier(options.max_staleness, options.on_stale, version, options.gradients_per_update)

    def _rules(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        policy, rule = policy_and_momentum(self.options, [optimizer], self.workers)
        return {"policy": policy, "momentum_rule": rule}

    def attach(self, worker: int, slot: int = 0) -> Buffers:
        """Gives a worker memory that all shards see."""
        segment = SharedSegment(self.layout.numel, self.layout.dtype)
        self.placement.attach(worker, slot, segment)
        segment.release()
        self.channels[worker, slot] = RecordedChannel(segment.buffers)
        return segment.buffers


def parameters_of(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
