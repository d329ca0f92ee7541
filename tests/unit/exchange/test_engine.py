"""An engine takes the place of another when param groups have been added; what two slots per rank need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_async import AMSGrad
from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import FailureLatch
from tests.harness import Entrance


def make_engine(optimizer: torch.optim.Optimizer, version: int = 0, predecessor: Engine | None = None) -> Engine:
    return Engine(
        rank=0,
        world_size=1,
        optimizers=[optimizer],
        options=ExchangeOptions("auto", "wait", "shared", "auto", 60.0),
        latch=FailureLatch(),
        listener=None,
        stats=RunStats(1),
        observers=[],
        version=version,
        meet=str,
        predecessor=predecessor,
    )


def train(engine: Engine, parameters: list[nn.Parameter], steps: int) -> None:
    assert engine.service is not None
    engine.service.begin_epoch(range(steps))
    engine.service.open(steps)
    while engine.worker.draw():
        engine.worker.begin_batch(1)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        engine.worker.step(0)
    engine.worker.finish_segment()
    engine.worker.refresh()


def build(optimizers: int = 1, **options: Any) -> Engine:
    return Engine(
        rank=0,
        world_size=4,
        optimizers=[AMSGrad([torch.nn.Parameter(torch.zeros(2))]) for _ in range(optimizers)],
        options=ExchangeOptions(overlap=True, **options),
        latch=FailureLatch(),
        listener=None,
        stats=RunStats(4),
        observers=[],
        version=0,
        meet=str,
    )


def test_overlap_needs_room_for_two_gradients_of_each_rank() -> None:
    with pytest.raises(ValueError, match=r"8 in all, and max_staleness=6 .* at least 7"):
        build(max_staleness=6)


def test_overlap_takes_one_optimizer() -> None:
    with pytest.raises(ValueError, match="overlap=True takes one optimizer and there are 2"):
        build(optimizers=2)


def test_a_successor_has_the_version_the_master_weights_and_the_state_of_what_was_there() -> None:
    old, new = (nn.Parameter(torch.full((3,), 1.0, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = AMSGrad([old], lr=1e-4)
    first = make_engine(optimizer)
    train(first, [old], steps=3)
    assert first.local_service is not None
    before = first.local_service.holder.snapshot()
    assert first.owns([optimizer])

    optimizer.add_param_group({"params": [new], "lr": 0.5})
    assert not first.owns([optimizer])
    first.close()
    second = make_engine(optimizer, first.worker.version, predecessor=first)

    assert second.owns([optimizer])
    assert second.local_service is not None
    after = second.local_service.holder.snapshot()
    assert second.worker.version == after.version == before.version == 3
    # In bfloat16 they would all be 1.
    assert torch.equal(after.parameters, torch.cat([before.parameters, torch.ones(3)]))
    assert not torch.equal(before.parameters, torch.ones(3))
    assert list(after.optimizer_states[0]["state"]) == [0]
    for name, value in before.optimizer_states[0]["state"][0].items():
        assert torch.equal(after.optimizer_states[0]["state"][0][name], value)
    assert [group["lr"] for group in after.optimizer_states[0]["param_groups"]] == [1e-4, 0.5]
    train(second, [old, new], steps=2)
    steps = [
        state["step"].item() for state in second.local_service.holder.snapshot().optimizer_states[0]["state"].values()
    ]
    assert steps == [5, 2]
    second.close()


def test_the_only_worker_has_the_holders_own_parameters_and_keeps_its_values() -> None:
    parameter = nn.Parameter(torch.ones(3))
    engine = make_engine(AMSGrad([parameter], lr=0.1))
    assert engine.local_service is not None

    train(engine, [parameter], steps=2)

    assert parameter.data_ptr() == engine.local_service.holder.lend().data_ptr()
    values = parameter.detach().clone()
    engine.close()
    engine.local_service.holder.lend().zero_()
    assert torch.equal(parameter, values)


def test_the_holder_takes_over_only_what_was_changed() -> None:
    kept, changed = (nn.Parameter(torch.full((3,), 1.0, dtype=torch.bfloat16)) for _ in range(2))
    engine = make_engine(AMSGrad([kept, changed], lr=1e-4))
    train(engine, [kept, changed], steps=3)
    assert engine.local_service is not None
    before = engine.local_service.holder.snapshot().parameters

    changed.data.fill_(7.0)
    engine.load_parameters()

    assert torch.equal(
        engine.local_service.holder.snapshot().parameters, torch.cat([before[:3], torch.full((3,), 7.0)])
    )
    assert not torch.equal(before[:3], torch.ones(3))
    engine.close()


def test_what_is_rounded_on_the_wire_never_becomes_the_holders() -> None:
    parameter = nn.Parameter(torch.rand(50, generator=torch.Generator().manual_seed(1)))
    before, latch = parameter.detach().clone(), FailureLatch()
    entrance = Entrance(2, latch)
    engine = Engine(
        rank=0,
        world_size=2,
        optimizers=[AMSGrad([parameter])],
        options=ExchangeOptions(overlap=True, transport="tcp", wire_dtype="bf16", parameter_wire_dtype="bf16"),
        latch=latch,
        listener=entrance.listener,
        stats=RunStats(2),
        observers=[],
        version=0,
        meet=str,
    )

    engine.worker.refresh()
    engine.load_parameters()

    snapshot = engine.snapshot()
    engine.close()
    entrance.close()
    assert snapshot is not None
    assert torch.equal(snapshot.parameters, before)


def test_a_successor_reports_the_tickets_that_its_predecessor_has_drawn() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AMSGrad([parameter], lr=0.1)
    first = make_engine(optimizer)
    assert first.service is not None
    first.service.begin_epoch(range(4))
    first.service.open(4)
    # The loader has two batches on their way when the segment ends.
    assert [list(first.worker.draw()) for _ in range(2)] == [[0], [1]]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    first.close()

    second = make_engine(optimizer, first.worker.version, predecessor=first)
    second.worker.begin_batch(1)
    parameter.grad = torch.ones(3)
    second.worker.step(0)
    second.worker.release(1, stream_over=False)

    assert second.local_service is not None
    assert second.local_service.ledger.applied() == [(0, 1)]
    # The answer to the push has brought another one.
    assert second.local_service.ledger.leased(0) == 1
    second.worker.finish_segment()
    assert second.local_service.unfinished() == 3
    second.close()


def test_an_epoch_that_is_left_early_leaves_no_ticket_for_the_next_one_to_report() -> None:
    parameter = nn.Parameter(torch.ones(3))
    engine = make_engine(AMSGrad([parameter], lr=0.1))
    assert engine.service is not None
    engine.service.begin_epoch(range(4))
    engine.service.open(4)
    for _ in range(2):
        engine.worker.draw()
    engine.worker.finish_segment()

    engine.worker.begin_epoch()
    train(engine, [parameter], steps=4)

    assert engine.local_service is not None
    assert engine.local_service.ledger.applied() == [(0, 4)]
    engine.close()
