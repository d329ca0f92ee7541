"""However far the followers trail, all shards apply the same gradients in one order, each once, within the bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_async import AMSGrad
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.types import Push, Update
from lightning_async.transport.base import Buffers
from lightning_async.transport.message import Parameters
from tests.unit.shards.rig import Rig, parameters_of

SHAPES = [(5, 11), (3,), (40,)]


@dataclass
class FakeWorker:
    """Pulls, computes a gradient that nobody else has, pushes it, and so on."""

    rank: int
    buffers: Buffers
    state: str = "asks"
    version: int = 0
    expected: Tensor = field(default_factory=lambda: torch.zeros(0))
    push: Push | None = None


class Cluster:
    """Workers at a holder with shards, and a plain holder that is asked the same."""

    def __init__(self, shards: int, workers: int, options: ExchangeOptions) -> None:
        self.parameters: list[nn.Parameter] = parameters_of(SHAPES)
        self.optimizer = AMSGrad(self.parameters, lr=0.05)
        self.rig = Rig(self.optimizer, shards, workers, options)
        self.workers = [FakeWorker(rank, self.rig.attach(rank)) for rank in range(workers)]
        self.generator = torch.Generator().manual_seed(7)
        self.updates: list[Update] = []
        self.groups = tuple(HyperparamLayout(self.optimizer).read(self.optimizer.param_groups))
        for process in self.rig.processes:
            process.at_once = False

    def act(self, worker: FakeWorker, spoils: bool, leaves_out: bool) -> None:
        """Takes a worker's next step, if it can."""
        {"asks": self._read, "waits": self._hear, "computes": self._compute, "pushes": self._push}[worker.state](
            worker, spoils, leaves_out
        )

    def _read(self, worker: FakeWorker, *_: bool) -> None:
        rig = self.rig
        version = rig.sharded.try_pull(worker.rank, worker.buffers.parameters)
        worker.expected = torch.zeros(rig.layout.numel)
        assert rig.plain.try_pull(worker.rank, worker.expected) == version
        if version is not None:
            worker.version, worker.state = version, "waits"
            rig.channels[worker.rank, 0].sent.clear()
            channel = rig.channels[worker.rank, 0]
            rig.placement.deliver(channel, Parameters(worker.rank, version), worker.buffers.parameters)

    def _hear(self, worker: FakeWorker, *_: bool) -> None:
        if self.rig.channels[worker.rank, 0].sent:
            # It has the whole vector of one version, whichever shards were late.
            assert torch.equal(worker.buffers.parameters, worker.expected)
            worker.state = "computes"

    def _compute(self, worker: FakeWorker, spoils: bool, leaves_out: bool) -> None:
        gradient = worker.buffers.gradient
        gradient.copy_(torch.randn(gradient.shape, generator=self.generator))
        views: list[Tensor | None] = [*self.rig.layout.views(gradient, 0)]
        if leaves_out:
            views[1] = None
        worker.push = Push(
            worker.rank, 0, worker.version, views, self.groups, samples=3, flat=gradient, finite=not spoils
        )
        worker.state = "pushes"
        self._push(worker)

    def _push(self, worker: FakeWorker, *_: bool) -> None:
        assert worker.push is not None
        update = self.rig.sharded.try_push(worker.push)
        other = self.rig.plain.try_push(worker.push)
        assert (update is None) == (other is None)
        if update is not None and other is not None:
            assert (update.version, update.applied, update.staleness) == (other.version, other.applied, other.staleness)
            self.updates.append(update)
            worker.state = "asks"

    def catch_up(self) -> None:
        """Has every follower do all that it was told."""
        for process in self.rig.processes:
            while process.queue:
                process.work()


OPTIONS = [
    ExchangeOptions(max_staleness=0),
    ExchangeOptions(max_staleness=3),
    ExchangeOptions(max_staleness=1, on_stale="drop"),
    ExchangeOptions(max_staleness=2, gradients_per_update=2, staleness_policy="damping"),
    ExchangeOptions(max_staleness=None, staleness_policy="look_ahead", momentum_correction="auto"),
    ExchangeOptions(max_staleness=4, gradients_per_update=3, staleness_policy="ordered_momentum"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@settings(max_examples=12)
@given(data=st.data())
def test_all_shards_are_one_holder_under_any_interleaving(options: ExchangeOptions, data: Any) -> None:
    shards, workers = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    cluster = Cluster(shards, workers, options)
    processes = cluster.rig.processes
    actors = st.tuples(st.integers(0, workers + len(processes) - 1), st.booleans(), st.booleans())

    for actor, rare, leaves_out in data.draw(st.lists(actors, min_size=30, max_size=80)):
        if actor < workers:
            cluster.act(cluster.workers[actor], spoils=rare and actor == 1, leaves_out=leaves_out)
        elif processes[actor - workers].queue:
            processes[actor - workers].work()
    for process in processes:
        process.at_once = True
    cluster.catch_up()

    bound = options.max_staleness
    assert bound is None or all(update.staleness <= int(bound) for update in cluster.updates if update.applied)
    ours, theirs = cluster.rig.sharded.snapshot(), cluster.rig.plain.snapshot()
    assert ours.version == theirs.version and torch.equal(ours.parameters, theirs.parameters)
    for place, state in theirs.optimizer_states[0]["state"].items():
        mine = ours.optimizer_states[0]["state"][place]
        assert all(torch.equal(value, mine[key]) for key, value in state.items())
    assert (ours.gathered is None) == (theirs.gathered is None)
