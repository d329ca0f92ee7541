"""Gradients that are not finite: rejected one by one, as if they had never been computed, with their batches done."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from lightning_async.exchange.worker import Worker
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import OnStale
from lightning_async.transport.message import Goodbye
from tests.harness import Exchange

pytestmark = pytest.mark.timeout(30)


def train(barrier: StalenessBarrier, steps: int, spoiled: Collection[int], omitted: Collection[int] = ()) -> Exchange:
    """One worker's steps; some gradients have one NaN in their second parameter, some batches give none."""
    exchange = Exchange([3], workers=1, tickets=steps, barrier=barrier)
    served = exchange.serve(0)
    worker = exchange.worker(0, served.channel)
    generator = torch.Generator().manual_seed(1)
    (parameter,) = exchange.parameters[0]
    for step in range(steps):
        assert worker.draw()
        worker.begin_batch(1)
        parameter.grad = torch.randn(3, generator=generator)
        if step in omitted:
            worker.skip()
            continue
        if step in spoiled:
            parameter.grad[1] = torch.nan
        assert worker.step(0) == (step not in spoiled)
    worker.finish_segment()
    served.channel.send(Goodbye(0))
    assert served.ended() is None
    return exchange


def parameters_of(exchange: Exchange) -> torch.Tensor:
    out = exchange.layout.buffer()
    exchange.holder.read(out)
    return out


@pytest.mark.parametrize("gradients_per_update", [1, 3])
@pytest.mark.parametrize("on_stale", ["wait", "drop"])
def test_what_is_left_is_the_run_without_them_bit_for_bit(gradients_per_update: int, on_stale: OnStale) -> None:
    def barrier() -> StalenessBarrier:
        return StalenessBarrier(4, on_stale, gradients_per_update=gradients_per_update)

    rejected, without = train(barrier(), 10, {0, 4, 5}), train(barrier(), 10, set(), {0, 4, 5})

    assert parameters_of(rejected).equal(parameters_of(without))
    assert rejected.holder.version == without.holder.version == 7 // gradients_per_update
    assert rejected.barrier.filled == without.barrier.filled == 7 % gradients_per_update
    assert rejected.ledger.progress() == (10, 0)
    assert [update.rejected for update in rejected.updates] == [step in {0, 4, 5} for step in range(10)]


def test_nobody_waits_for_a_worker_whose_gradients_are_rejected() -> None:
    exchange = Exchange([3], workers=2, tickets=20, barrier=StalenessBarrier(0))
    sick, well = (exchange.worker(rank, exchange.serve(rank).channel) for rank in range(2))
    sent = {sick: torch.inf, well: 1.0}

    # With the bound 0 one computes at a time: what is rejected must make room for the other.
    for worker in [sick, well] * 5:
        batch(worker, exchange, sent[worker])

    assert exchange.holder.version == 5
    assert [update.rejected for update in exchange.updates] == [True, False] * 5
    assert [update.staleness for update in exchange.updates] == [0] * 10


def batch(worker: Worker, exchange: Exchange, value: float) -> None:
    worker.draw()
    worker.begin_batch(1)
    exchange.parameters[0][0].grad = torch.full((3,), value)
    worker.step(0)
    worker.finish_segment()


def test_a_gradient_with_a_missing_part_is_judged_by_what_there_is() -> None:
    exchange = Exchange([2, 2], workers=1, tickets=4)
    served = exchange.serve(0)
    worker = exchange.worker(0, served.channel)
    first, second = exchange.parameters[0]
    for gradients in [(torch.ones(2), torch.full((2,), torch.nan)), (torch.ones(2), None)]:
        worker.draw()
        worker.begin_batch(1)
        first.grad, second.grad = gradients
        worker.step(0)

    assert [update.rejected for update in exchange.updates] == [True, False]
