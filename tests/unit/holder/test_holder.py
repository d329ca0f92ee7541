"""The holder as a monitor: threads stand in for ranks."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import Push, Update
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError

pytestmark = pytest.mark.timeout(30)
SIZES = (3, 5)


class Cluster:
    """A holder of two parameters, 3 and 5 numbers long, and its observer's notes."""

    def __init__(
        self, max_staleness: int | None = None, on_stale: Any = "wait", sizes: Sequence[int] = SIZES, version: int = 0
    ) -> None:
        self.template = AMSGrad([torch.nn.Parameter(torch.zeros(size)) for size in sizes], lr=0.1)
        self.layout = FlatLayout([self.template.param_groups[0]["params"]])
        self.latch = FailureLatch()
        self.updates: list[Update] = []
        self.barrier = StalenessBarrier(max_staleness, on_stale, version=version)
        self.initial = torch.ones(self.layout.numel)
        self.holder = Holder(self.layout, self.initial, [self.template], self.barrier, self.latch, self.updates.append)

    def push(self, worker: int, version: int, gradients: Sequence[Tensor | None] | None = None) -> Update:
        """Pushes ones, or ``gradients``."""
        if gradients is None:
            gradients = [torch.ones(shape) for shape in self.layout.shapes[0]]
        groups = HyperparamLayout(self.template).read(self.template.param_groups)
        push = Push(worker, 0, version, gradients, groups)
        seen, arrived = self.holder.changes, time.monotonic()
        while (update := self.holder.try_push(push, time.monotonic() - arrived)) is None:
            self.holder.wait_for_change(seen)
            seen = self.holder.changes
        return update

    def pull(self, worker: int) -> tuple[int, Tensor]:
        """The version and the parameters that a worker gets."""
        out = self.layout.buffer()
        seen = self.holder.changes
        while (version := self.holder.try_pull(worker, out)) is None:
            self.holder.wait_for_change(seen)
            seen = self.holder.changes
        return version, out

    def parameters(self) -> Tensor:
        out = self.layout.buffer()
        self.holder.read(out)
        return out


class Rank(threading.Thread):
    """Runs one call, and keeps what comes of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def waits(self) -> bool:
        """Whether the call is still held back after a moment."""
        self.join(0.1)
        return self.is_alive()

    def outcome(self) -> Any:
        """The call's result, which must come soon."""
        self.join(5.0)
        assert not self.is_alive(), "still waiting"
        if self.error is not None:
            raise self.error
        return self.result


def test_a_push_is_one_step_of_the_optimizer() -> None:
    cluster = Cluster()
    reference = [torch.nn.Parameter(torch.ones(size)) for size in SIZES]
    optimizer = AMSGrad(reference, lr=0.1)
    generator = torch.Generator().manual_seed(0)

    for _ in range(5):
        version, _ = cluster.pull(0)
        gradients = [torch.randn(size, generator=generator) for size in SIZES]
        cluster.push(0, version, gradients)
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    assert cluster.holder.version == 5
    torch.testing.assert_close(cluster.parameters(), torch.cat([p.detach() for p in reference]))


def test_the_workers_hyper_parameters_of_that_push_are_used() -> None:
    cluster = Cluster()
    for lr in (0.5, 0.0):
        before = cluster.parameters()
        version, _ = cluster.pull(0)
        cluster.template.param_groups[0]["lr"] = lr

        cluster.push(0, version)

        assert cluster.parameters().equal(before) is (lr == 0.0)


def test_with_bound_zero_workers_take_turns() -> None:
    cluster = Cluster(max_staleness=0)
    cluster.pull(0)
    others = [Rank(lambda worker=worker: cluster.pull(worker)) for worker in (1, 2)]
    assert all(rank.waits() for rank in others)

    cluster.push(0, version=0)
    first = next(rank for rank in others if not rank.waits())
    second = others[1 - others.index(first)]

    assert first.outcome()[0] == 1
    assert second.waits()
    cluster.push(1 + others.index(first), version=1)
    assert second.outcome()[0] == 2
    assert [update.staleness for update in cluster.updates] == [0, 0]


def test_a_push_that_would_make_another_too_stale_waits_for_it_and_only_that_long() -> None:
    cluster = Cluster(max_staleness=1)
    cluster.pull(0)
    cluster.pull(1)
    cluster.push(0, version=0)
    cluster.pull(0)
    parked = Rank(lambda: cluster.push(0, version=1))
    assert parked.waits()
    assert cluster.holder.version == 1

    cluster.push(1, version=0)

    update = parked.outcome()
    assert (update.version, update.staleness, update.applied) == (3, 1, True)
    assert update.parked_s > 0.0
    assert [update.staleness for update in cluster.updates] == [0, 1, 1]


def test_a_worker_that_leaves_holds_nobody_back() -> None:
    cluster = Cluster(max_staleness=0)
    cluster.pull(0)
    waiting = Rank(lambda: cluster.pull(1))
    assert waiting.waits()

    cluster.holder.leave(0)

    assert waiting.outcome()[0] == 0


@pytest.mark.parametrize("attempt", range(5))  # which thread wakes first is not the test's to say
def test_a_reader_that_may_go_tells_the_next(attempt: int) -> None:
    cluster = Cluster(max_staleness=1)
    cluster.pull(0)
    cluster.pull(1)
    # Rank 3 waits first, and is the second in the queue.
    cluster.barrier.ask((2, 0))
    waiting = [Rank(lambda: cluster.pull(3)), Rank(lambda: cluster.pull(2))]
    assert all(rank.waits() for rank in waiting)

    with cluster.holder._lock:
        cluster.holder.leave(0)
        cluster.holder.leave(1)

    assert [rank.outcome()[0] for rank in waiting] == [0, 0]


def test_on_stale_drop_waits_for_nobody_and_leaves_the_parameters_alone() -> None:
    cluster = Cluster(max_staleness=0, on_stale="drop")
    cluster.pull(0)
    cluster.pull(1)
    cluster.push(0, version=0)
    before = cluster.parameters()

    update = cluster.push(1, version=0)

    assert (update.applied, update.staleness, update.version) == (False, 1, 1)
    assert cluster.parameters().equal(before)
    assert len(cluster.updates) == 2
    assert cluster.pull(1)[0] == 1


def test_a_failure_wakes_everyone_who_waits_and_stops_everyone_who_comes() -> None:
    cluster = Cluster(max_staleness=1)
    cluster.pull(0)
    cluster.pull(1)
    cluster.push(0, version=0)
    cluster.pull(0)
    waiting = [Rank(lambda: cluster.push(0, version=1)), Rank(lambda: cluster.pull(2))]
    assert all(rank.waits() for rank in waiting)

    started = time.monotonic()
    cluster.latch.trip(RunFailure(1, "its process was killed by SIGKILL"))

    for rank in waiting:
        with pytest.raises(WorkerFailedError, match="rank 1 failed: its process was killed"):
            rank.outcome()
    assert time.monotonic() - started < 2.0
    with pytest.raises(WorkerFailedError):
        cluster.push(1, version=0)
    with pytest.raises(WorkerFailedError):
        cluster.pull(3)
    assert cluster.holder.version == 1


@pytest.mark.parametrize("version", [0, 2, 7])
def test_a_gradient_of_another_version_than_the_worker_holds_is_refused(version: int) -> None:
    cluster = Cluster(version=1)
    cluster.pull(0)

    with pytest.raises(ValueError, match=f"pushes a gradient of version {version} but holds 1"):
        cluster.push(0, version)
    with pytest.raises(ValueError, match="but holds None"):
        cluster.push(1, version)

    assert cluster.holder.version == 1


def test_a_parameter_without_gradient_and_its_state_are_left_alone() -> None:
    cluster = Cluster()
    for gradients in ([torch.ones(3), None], [None, torch.ones(5)], [torch.ones(3), None]):
        version, _ = cluster.pull(0)
        cluster.push(0, version, gradients)

    first, second = cluster.layout.views(cluster.parameters(), 0)
    state = cluster.holder.snapshot().optimizer_states[0]["state"]

    reference = torch.nn.Parameter(torch.ones(3))
    optimizer = AMSGrad([reference], lr=0.1)
    for _ in range(2):
        reference.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(first, reference.detach())
    torch.testing.assert_close(second, torch.full((5,), 0.9))
    assert [float(state[index]["step"]) for index in (0, 1)] == [2.0, 1.0]


def test_a_parameter_that_never_had_a_gradient_has_no_state() -> None:
    cluster = Cluster()
    version, _ = cluster.pull(0)
    cluster.push(0, version, [torch.ones(3), None])

    assert list(cluster.holder.snapshot().optimizer_states[0]["state"]) == [0]
    assert cluster.layout.views(cluster.parameters(), 0)[1].equal(torch.ones(5))


def test_what_is_read_is_one_version_while_others_push() -> None:
    cluster = Cluster(sizes=(20_000, 20_000))
    expected = [1.0]
    single = torch.nn.Parameter(torch.ones(1))
    optimizer = AMSGrad([single], lr=0.1)
    pushes, ranks = 40, 3
    for _ in range(pushes * ranks):
        single.grad = torch.ones(1)
        optimizer.step()
        expected.append(float(single.detach()))

    def work(worker: int) -> None:
        for _ in range(pushes):
            version, parameters = cluster.pull(worker)
            assert_of_version(parameters, version)
            cluster.push(worker, version)

    def assert_of_version(parameters: Tensor, version: int) -> None:
        assert parameters.min() == parameters.max()
        assert float(parameters[0]) == pytest.approx(expected[version], abs=1e-5)

    workers = [Rank(lambda worker=worker: work(worker)) for worker in range(ranks)]
    snapshots = 0
    while any(rank.is_alive() for rank in workers):
        snapshot = cluster.holder.snapshot()
        assert_of_version(snapshot.parameters, snapshot.version)
        for state in snapshot.optimizer_states[0]["state"].values():
            assert float(state["step"]) == snapshot.version
            assert state["exp_avg"].min() == state["exp_avg"].max()
        snapshots += 1

    for rank in workers:
        rank.outcome()
    assert snapshots > 1
    assert cluster.holder.version == pushes * ranks


def test_a_snapshot_owns_its_memory() -> None:
    cluster = Cluster()
    cluster.push(0, cluster.pull(0)[0])
    snapshot = cluster.holder.snapshot()
    parameters = snapshot.parameters.clone()
    moment = snapshot.optimizer_states[0]["state"][0]["exp_avg"].clone()

    cluster.push(0, cluster.pull(0)[0])

    assert snapshot.parameters.equal(parameters)
    assert snapshot.optimizer_states[0]["state"][0]["exp_avg"].equal(moment)


def test_a_restored_holder_goes_on_as_the_one_that_was_saved() -> None:
    saved = Cluster()
    for _ in range(3):
        saved.push(0, saved.pull(0)[0])
    snapshot = saved.holder.snapshot()
    other = Cluster()
    other.holder = Holder(
        other.layout, snapshot.parameters, [other.template], other.barrier, other.latch, other.updates.append
    )

    assert other.holder.restore(snapshot.version, snapshot.optimizer_states) is False
    for cluster in (saved, other):
        cluster.push(0, cluster.pull(0)[0])

    assert other.holder.version == saved.holder.version == 4
    assert other.parameters().equal(saved.parameters())
    # The holder has taken a copy: stepping on has left the snapshot alone.
    assert float(snapshot.optimizer_states[0]["state"][0]["step"]) == 3.0


def test_adams_state_is_taken_over_and_said_to_be() -> None:
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in SIZES]
    adam = torch.optim.Adam(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    cluster = Cluster()

    assert cluster.holder.restore(1, [adam.state_dict()]) is True

    state = cluster.holder.snapshot().optimizer_states[0]["state"][0]
    assert state["max_exp_avg_sq"].equal(state["exp_avg_sq"])


def test_the_version_is_not_set_under_somebody_who_computes() -> None:
    cluster = Cluster()
    cluster.pull(0)

    with pytest.raises(ValueError, match="hold an earlier one"):
        cluster.holder.restore(5, [cluster.template.state_dict()])


def test_a_run_does_not_keep_a_holder_that_another_has_taken_the_place_of() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    latch = FailureLatch()
    holder = Holder(
        FlatLayout([[parameter]]), torch.ones(2), [AMSGrad([parameter], lr=0.1)], StalenessBarrier(None), latch
    )
    kept = weakref.ref(holder)

    del holder
    gc.collect()

    assert kept() is None
    latch.trip(RunFailure(1, "its process was killed by SIGKILL"))
