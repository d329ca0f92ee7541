"""The holder as a monitor: threads stand in for ranks."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import HalfUpdatedError, Push, Update
from lightning_async.policies.base import Arrival, StalenessPolicy
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from tests.harness import Call, Exchange

pytestmark = pytest.mark.timeout(30)
SIZES = (3, 5)


def build(
    max_staleness: int | None = None,
    on_stale: Any = "wait",
    sizes: Sequence[int] = SIZES,
    version: int = 0,
    initial: Tensor | None = None,
) -> Exchange:
    """A holder of two parameters, 3 and 5 numbers long."""
    return Exchange(sizes, barrier=StalenessBarrier(max_staleness, on_stale, version=version), initial=initial)


def push(exchange: Exchange, worker: int, version: int, gradients: Sequence[Tensor | None] | None = None) -> Update:
    """Pushes ones, or ``gradients``; waits while the holder holds them back."""
    if gradients is None:
        gradients = [torch.ones(shape) for shape in exchange.layout.shapes[0]]
    groups = exchange.hyperparams[0].read(exchange.optimizers[0].param_groups)
    pushed = Push(worker, 0, version, gradients, groups)
    seen, arrived = exchange.holder.changes, time.monotonic()
    while (update := exchange.holder.try_push(pushed, time.monotonic() - arrived)) is None:
        exchange.holder.wait_for_change(seen)
        seen = exchange.holder.changes
    return update


def pull(exchange: Exchange, worker: int) -> tuple[int, Tensor]:
    """The version and the parameters that a worker gets, which may have to wait for them."""
    out = exchange.layout.buffer()
    seen = exchange.holder.changes
    while (version := exchange.holder.try_pull(worker, out)) is None:
        exchange.holder.wait_for_change(seen)
        seen = exchange.holder.changes
    return version, out


def parameters_of(exchange: Exchange) -> Tensor:
    out = exchange.layout.buffer()
    exchange.holder.read(out)
    return out


def test_a_push_is_one_step_of_the_optimizer() -> None:
    exchange = build()
    reference = [torch.nn.Parameter(torch.ones(size)) for size in SIZES]
    optimizer = AMSGrad(reference, lr=0.1)
    generator = torch.Generator().manual_seed(0)

    for _ in range(5):
        version, _ = pull(exchange, 0)
        gradients = [torch.randn(size, generator=generator) for size in SIZES]
        push(exchange, 0, version, gradients)
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    assert exchange.holder.version == 5
    torch.testing.assert_close(parameters_of(exchange), torch.cat([p.detach() for p in reference]))


def test_the_workers_hyper_parameters_of_that_push_are_used() -> None:
    exchange = build()
    for lr in (0.5, 0.0):
        before = parameters_of(exchange)
        version, _ = pull(exchange, 0)
        exchange.optimizers[0].param_groups[0]["lr"] = lr

        push(exchange, 0, version)

        assert parameters_of(exchange).equal(before) is (lr == 0.0)


def test_with_bound_zero_workers_take_turns() -> None:
    exchange = build(max_staleness=0)
    pull(exchange, 0)
    others = [Call(lambda worker=worker: pull(exchange, worker)) for worker in (1, 2)]
    assert all(rank.waits() for rank in others)

    push(exchange, 0, version=0)
    first = next(rank for rank in others if not rank.waits())
    second = others[1 - others.index(first)]

    assert first.outcome()[0] == 1
    assert second.waits()
    push(exchange, 1 + others.index(first), version=1)
    assert second.outcome()[0] == 2
    assert [update.staleness for update in exchange.updates] == [0, 0]


def test_a_push_that_would_make_another_too_stale_waits_for_it_and_only_that_long() -> None:
    exchange = build(max_staleness=1)
    pull(exchange, 0)
    pull(exchange, 1)
    push(exchange, 0, version=0)
    pull(exchange, 0)
    parked = Call(lambda: push(exchange, 0, version=1))
    assert parked.waits()
    assert exchange.holder.version == 1

    push(exchange, 1, version=0)

    update = parked.outcome()
    assert (update.version, update.staleness, update.applied) == (3, 1, True)
    assert update.parked_s > 0.0
    assert [update.staleness for update in exchange.updates] == [0, 1, 1]


def test_a_worker_that_leaves_holds_nobody_back() -> None:
    exchange = build(max_staleness=0)
    pull(exchange, 0)
    waiting = Call(lambda: pull(exchange, 1))
    assert waiting.waits()

    exchange.holder.leave(0)

    assert waiting.outcome()[0] == 0


@pytest.mark.parametrize("attempt", range(5))  # which thread wakes first is not the test's to say
def test_a_reader_that_may_go_tells_the_next(attempt: int) -> None:
    exchange = build(max_staleness=1)
    pull(exchange, 0)
    pull(exchange, 1)
    # Rank 3 waits first, and is the second in the queue.
    exchange.barrier.ask((2, 0))
    waiting = [Call(lambda: pull(exchange, 3)), Call(lambda: pull(exchange, 2))]
    assert all(rank.waits() for rank in waiting)

    with exchange.holder._lock:
        exchange.holder.leave(0)
        exchange.holder.leave(1)

    assert [rank.outcome()[0] for rank in waiting] == [0, 0]


def test_on_stale_drop_waits_for_nobody_and_leaves_the_parameters_alone() -> None:
    exchange = build(max_staleness=0, on_stale="drop")
    pull(exchange, 0)
    pull(exchange, 1)
    push(exchange, 0, version=0)
    before = parameters_of(exchange)

    update = push(exchange, 1, version=0)

    assert (update.applied, update.staleness, update.version) == (False, 1, 1)
    assert parameters_of(exchange).equal(before)
    assert len(exchange.updates) == 2
    assert pull(exchange, 1)[0] == 1


def test_a_failure_wakes_everyone_who_waits_and_stops_everyone_who_comes() -> None:
    exchange = build(max_staleness=1)
    pull(exchange, 0)
    pull(exchange, 1)
    push(exchange, 0, version=0)
    pull(exchange, 0)
    waiting = [Call(lambda: push(exchange, 0, version=1)), Call(lambda: pull(exchange, 2))]
    assert all(rank.waits() for rank in waiting)

    exchange.latch.trip(RunFailure(1, "its process was killed by SIGKILL"))

    for rank in waiting:
        with pytest.raises(WorkerFailedError, match="rank 1 failed: its process was killed"):
            rank.outcome()
    with pytest.raises(WorkerFailedError):
        push(exchange, 1, version=0)
    with pytest.raises(WorkerFailedError):
        pull(exchange, 3)
    assert exchange.holder.version == 1


@pytest.mark.parametrize("version", [0, 2, 7])
def test_a_gradient_of_another_version_than_the_worker_holds_is_refused(version: int) -> None:
    exchange = build(version=1)
    pull(exchange, 0)

    with pytest.raises(ValueError, match=f"pushes a gradient of version {version} but holds 1"):
        push(exchange, 0, version)
    with pytest.raises(ValueError, match="but holds None"):
        push(exchange, 1, version)

    assert exchange.holder.version == 1


def test_a_parameter_without_gradient_and_its_state_are_left_alone() -> None:
    exchange = build()
    for gradients in ([torch.ones(3), None], [None, torch.ones(5)], [torch.ones(3), None]):
        version, _ = pull(exchange, 0)
        push(exchange, 0, version, gradients)

    first, second = exchange.layout.views(parameters_of(exchange), 0)
    state = exchange.holder.snapshot().optimizer_states[0]["state"]

    reference = torch.nn.Parameter(torch.ones(3))
    optimizer = AMSGrad([reference], lr=0.1)
    for _ in range(2):
        reference.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(first, reference.detach())
    torch.testing.assert_close(second, torch.full((5,), 0.9))
    assert [float(state[index]["step"]) for index in (0, 1)] == [2.0, 1.0]


def test_a_parameter_that_never_had_a_gradient_has_no_state() -> None:
    exchange = build()
    version, _ = pull(exchange, 0)
    push(exchange, 0, version, [torch.ones(3), None])

    assert list(exchange.holder.snapshot().optimizer_states[0]["state"]) == [0]
    assert exchange.layout.views(parameters_of(exchange), 0)[1].equal(torch.ones(5))


def test_what_is_read_is_one_version_while_others_push() -> None:
    exchange = build(sizes=(20_000, 20_000))
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
            version, parameters = pull(exchange, worker)
            assert_of_version(parameters, version)
            push(exchange, worker, version)

    def assert_of_version(parameters: Tensor, version: int) -> None:
        assert parameters.min() == parameters.max()
        assert float(parameters[0]) == pytest.approx(expected[version], abs=1e-5)

    workers = [Call(lambda worker=worker: work(worker)) for worker in range(ranks)]
    snapshots = 0
    while any(rank.is_alive() for rank in workers):
        snapshot = exchange.holder.snapshot()
        assert_of_version(snapshot.parameters, snapshot.version)
        for state in snapshot.optimizer_states[0]["state"].values():
            assert float(state["step"]) == snapshot.version
            assert state["exp_avg"].min() == state["exp_avg"].max()
        snapshots += 1

    for rank in workers:
        rank.outcome()
    assert snapshots > 1
    assert exchange.holder.version == pushes * ranks


def test_a_snapshot_owns_its_memory() -> None:
    exchange = build()
    push(exchange, 0, pull(exchange, 0)[0])
    snapshot = exchange.holder.snapshot()
    parameters = snapshot.parameters.clone()
    moment = snapshot.optimizer_states[0]["state"][0]["exp_avg"].clone()

    push(exchange, 0, pull(exchange, 0)[0])

    assert snapshot.parameters.equal(parameters)
    assert snapshot.optimizer_states[0]["state"][0]["exp_avg"].equal(moment)


def test_a_restored_holder_goes_on_as_the_one_that_was_saved() -> None:
    saved = build()
    for _ in range(3):
        push(saved, 0, pull(saved, 0)[0])
    snapshot = saved.holder.snapshot()
    other = build(initial=snapshot.parameters)

    assert other.holder.restore(snapshot.version, snapshot.optimizer_states) is False
    for exchange in (saved, other):
        push(exchange, 0, pull(exchange, 0)[0])

    assert other.holder.version == saved.holder.version == 4
    assert parameters_of(other).equal(parameters_of(saved))
    # The holder has taken a copy: stepping on has left the snapshot alone.
    assert float(snapshot.optimizer_states[0]["state"][0]["step"]) == 3.0


def test_adams_state_is_taken_over_and_said_to_be() -> None:
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in SIZES]
    adam = torch.optim.Adam(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    exchange = build()

    assert exchange.holder.restore(1, [adam.state_dict()]) is True

    state = exchange.holder.snapshot().optimizer_states[0]["state"][0]
    assert state["max_exp_avg_sq"].equal(state["exp_avg_sq"])


def test_the_version_is_not_set_under_somebody_who_computes() -> None:
    exchange = build()
    pull(exchange, 0)

    with pytest.raises(ValueError, match="hold parameters"):
        exchange.holder.restore(5, [exchange.optimizers[0].state_dict()])


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


def test_a_worker_that_reads_next_has_its_place_from_its_push_on() -> None:
    # Two gradients make a version, and worker 1 is late with asking for the one that its own has completed.
    exchange = Exchange(SIZES, barrier=StalenessBarrier(0, gradients_per_update=2))
    holder, out = exchange.holder, exchange.layout.buffer()
    gradients = [torch.ones(size) for size in SIZES]
    for worker in (0, 1):
        holder.try_pull(worker, out)
    for worker in (0, 1):
        holder.try_push(Push(worker, 0, 0, gradients, ()), reads_next=lambda: True)
    assert holder.try_pull(0, out) == 1
    holder.try_push(Push(0, 0, 1, gradients, ()), reads_next=lambda: True)

    # Else the version would be made of two gradients of worker 0 and of none of worker 1.
    assert holder.try_pull(0, out) is None
    assert holder.try_pull(1, out) == 1


class Counting(StalenessPolicy):
    """Counts gradients, and moves answers by one."""

    def __init__(self, per_update: int) -> None:
        self.count = 0
        self.bind(4, per_update)

    def bind(self, workers: int, gradients_per_update: int) -> None:
        self.scale = 1.0 / gradients_per_update

    def gradient_factor(self, arrival: Arrival) -> float:
        self.count += 1
        return self.scale

    def look_ahead(self, out: Sequence[Tensor], optimizer: Any) -> None:
        torch._foreach_add_(list(out), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


def test_other_rules_hold_from_a_versions_border_on_and_the_policy_goes_on_with_what_it_has_learned() -> None:
    exchange = build(max_staleness=4)
    holder, later = exchange.holder, Counting(1)
    holder.adjust(0, "wait", 2, Counting(2), None)
    for worker in (0, 1):
        _, answered = pull(exchange, worker)
        # With a bound of 0 no gradient is stale: nobody looks ahead.
        assert torch.equal(answered, parameters_of(exchange))
    for worker in (0, 1):
        push(exchange, worker, 0)

    holder.adjust(3, "wait", 1, later, None)

    version, answered = pull(exchange, 0)
    assert version == 1
    assert torch.equal(answered[:3], parameters_of(exchange)[:3] + 1)
    push(exchange, 0, 1)
    assert holder.version == 2
    assert later.count == 3


def test_a_holder_refuses_other_rules_while_a_worker_computes() -> None:
    exchange = build(max_staleness=0)
    pull(exchange, 0)

    with pytest.raises(ValueError, match="hold parameters"):
        exchange.holder.adjust(3, "wait", 1, StalenessPolicy(), None)
    push(exchange, 0, 0)
    assert exchange.holder.version == 1


def test_what_an_interrupted_update_has_left_is_no_more_whole_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = build()
    holder = exchange.holder
    for worker in (0, 1):
        pull(exchange, worker)
    step = holder._intake.take

    def interrupted(*arguments: Any) -> None:
        step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(holder._intake, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push(exchange, 0, 0)
    monkeypatch.undo()

    with pytest.raises(HalfUpdatedError):
        push(exchange, 1, 0)
    with pytest.raises(HalfUpdatedError):
        holder.push_together([])
    # The gradient is in the parameters, and its batch does not count: as a checkpoint it would be computed again.
    with pytest.raises(HalfUpdatedError):
        holder.snapshot()
    assert holder.version == 0 and exchange.updates == []


def test_who_comes_after_an_update_that_an_error_has_broken_off_is_told_of_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exchange = build()
    for worker in (0, 1):
        pull(exchange, worker)

    def fails(*arguments: Any) -> None:
        raise ValueError("the policy's own")

    monkeypatch.setattr(exchange.holder._intake, "take", fails)
    with pytest.raises(ValueError, match="the policy's own"):
        push(exchange, 0, 0)

    # It may be told before the one whose update it was, and ends the run with what it was told.
    with pytest.raises(HalfUpdatedError, match="broken off by ValueError: the policy's own"):
        push(exchange, 1, 0)
