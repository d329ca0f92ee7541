"""Shards that are reached over the network are one holder: one order, and each gradient as a whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.exchange.parted_channel import PartConnection
from lightning_async.exchange.shared_payload import SharedPayload
from lightning_async.holder.held_state import same_state
from lightning_async.runtime import failure as failures
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.runtime.handshake import CONTROL, SEQUENCER, HandshakeError, handshake
from lightning_async.shards.operations import CopyOut, Serve
from lightning_async.shards.shard_server import _Port
from lightning_async.transport.fields import WireError
from lightning_async.transport.message import Part
from tests.harness import Call, eventually
from tests.unit.shards.rig import parameters_of
from tests.unit.shards.spread_rig import SHAPES, Spread, gradients_of

STEPS = 12


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Spread]]:
    # There are no heartbeats here that would know more of a lost connection.
    monkeypatch.setattr(failures, "_NEWS_TIMEOUT_S", 0.1)
    spreads: list[Spread] = []
    yield spreads
    for spread in spreads:
        for latch in spread.latches:
            latch.trip(RunFailure(0, "the test is over"))
        spread.close()


def train(spread: Spread, rank: int, steps: int = STEPS) -> list[tuple[int, Tensor]]:
    """Trains; returns each version that the rank has read, and what it was."""
    worker, read = spread.engines[rank].worker, []
    worker.pull()
    for step in range(steps):
        read.append((worker.version, spread.values(rank)))
        spread.compute(rank, step)
        worker.step(0)
    # Another one may wait for this rank's gradient.
    worker.finish_segment()
    return read


@pytest.mark.parametrize(("shards", "bound"), [(2, 0), (3, None), (4, 2)])
def test_ranks_that_push_at_once_train_as_one_optimizer_would_in_that_order(
    made: list[Spread], shards: int, bound: int | None
) -> None:
    spread = Spread(shards, workers=3, max_staleness=bound)
    made.append(spread)
    for rank in (1, 2):
        spread.join(rank)

    others = [Call(lambda rank=rank: train(spread, rank)) for rank in (1, 2)]
    read = train(spread, 0)
    read += [one for other in others for one in other.outcome()]

    parameters = parameters_of(SHAPES)
    optimizer = AMSGrad(parameters, lr=0.05, weight_decay=0.01, fused=True)
    versions = [torch.cat([parameter.detach().reshape(-1).clone() for parameter in parameters])]
    steps = [0, 0, 0]
    for update in spread.updates:
        rank = update.push.worker
        for parameter, gradient in zip(parameters, gradients_of(rank, steps[rank]), strict=True):
            parameter.grad = gradient
        optimizer.step()
        steps[rank] += 1
        versions.append(torch.cat([parameter.detach().reshape(-1).clone() for parameter in parameters]))
    taken = spread.service.snapshot()
    assert steps == [STEPS] * 3 and taken.version == 3 * STEPS
    assert torch.equal(taken.parameters, versions[-1])
    assert all(torch.equal(values, versions[version]) for version, values in read)
    state = {place: optimizer.state[parameter] for place, parameter in enumerate(parameters)}
    assert same_state(taken.optimizer_states[0]["state"], state)
    assert bound is None or max(update.staleness for update in spread.updates) <= bound


def test_what_is_loaded_and_restored_is_in_all_shards(made: list[Spread]) -> None:
    first, second = Spread(3, workers=2, max_staleness=None), Spread(2, workers=2, max_staleness=None)
    made += [first, second]
    train(first, 0, 3)
    taken = first.service.snapshot()

    second.service.restore(taken.version, taken.optimizer_states, taken.gathered, taken.policy)
    views = second.engines[0].layout.views(taken.parameters, 0)
    second.service.load_parameters([views])
    for spread in made:
        spread.join(1)
        train(spread, 1, 2)

    one, other = first.service.snapshot(), second.service.snapshot()
    assert one.version == other.version == 5
    assert torch.equal(one.parameters, other.parameters)
    assert same_state(one.optimizer_states[0]["state"], other.optimizer_states[0]["state"])
    assert same_state(second.service.optimizer_state(0), one.optimizer_states[0]["state"])


def test_an_engine_that_takes_anothers_place_goes_on_from_what_its_shards_held(made: list[Spread]) -> None:
    changed, plain = (Spread(3, workers=2, max_staleness=None) for _ in range(2))
    made += [changed, plain]
    for spread in made:
        spread.join(1)
        train(spread, 1, 2)

    for optimizer in changed.optimizers:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(7))], "lr": 0.5})
    changed.rebuild()
    for spread in made:
        train(spread, 0, 2)

    one, other = changed.service.snapshot(), plain.service.snapshot()
    assert torch.equal(one.parameters, torch.cat([other.parameters, torch.ones(7)]))
    assert same_state(one.optimizer_states[0]["state"], other.optimizer_states[0]["state"])


def test_a_worker_that_dies_in_mid_push_leaves_nothing_of_it_in_any_shard(
    made: list[Spread], monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = Spread(3, workers=2, max_staleness=None)
    made.append(spread)
    spread.join(1)
    train(spread, 1, 2)
    before = spread.service.snapshot()
    whole = PartConnection._exchange

    def die(self: PartConnection, number: int, gradient: Tensor | None, parameters: Tensor) -> int:
        if self.shard == 1:
            # The other shards have all of theirs.
            return whole(self, number, gradient, parameters)
        assert gradient is not None
        part = Part(self._worker, number, gradient.dtype, gradient.nbytes)
        self._connection.send(part)
        raise ConnectionResetError("its process was killed")

    monkeypatch.setattr(PartConnection, "_exchange", die)
    spread.compute(1, 2)
    with pytest.raises(WorkerFailedError):
        spread.engines[1].worker.step(0)

    assert eventually(lambda: spread.latches[0].failure is not None)
    failure = spread.latches[0].failure
    assert failure is not None and failure.rank == 1
    assert len(spread.updates) == 2 and spread.service.holder.version == before.version


def test_a_gradient_of_which_a_part_is_late_waits_for_it_and_others_go_on(
    made: list[Spread], monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = Spread(2, workers=3, max_staleness=None)
    made.append(spread)
    late = threading.Event()
    exchange = PartConnection._exchange

    def wait(self: PartConnection, number: int, gradient: Tensor | None, parameters: Tensor) -> int:
        if self._worker == 2 and gradient is not None:
            assert late.wait(20.0)
        return exchange(self, number, gradient, parameters)

    monkeypatch.setattr(PartConnection, "_exchange", wait)
    spread.join(1)
    spread.join(2)
    held = Call(lambda: train(spread, 2, 1))
    train(spread, 1, 3)

    assert held.waits()
    assert [update.push.worker for update in spread.updates] == [1, 1, 1]
    late.set()
    held.outcome()
    assert spread.service.holder.version == 4


def test_parameters_of_two_versions_are_no_answer(made: list[Spread], monkeypatch: pytest.MonkeyPatch) -> None:
    spread = Spread(2, workers=2, max_staleness=None)
    made.append(spread)
    spread.join(1)
    monkeypatch.setattr(_Port, "announce", lambda self, version: self._sender.run(lambda: self._send(version + 1)))

    with pytest.raises(WireError, match="shard 1 of the holder answers with version 1, the first one with 0"):
        spread.engines[1].worker.pull()


def test_a_shard_that_is_lost_ends_the_run_and_is_named(made: list[Spread]) -> None:
    spread = Spread(2, workers=2, max_staleness=None)
    made.append(spread)
    spread.join(1)
    train(spread, 1, 1)

    spread.shards[0].server.close()
    spread.compute(1, 1)
    with pytest.raises(WorkerFailedError, match="shard 1 of the holder is lost"):
        spread.engines[1].worker.step(0)

    failure = spread.latches[0].wait(10.0)
    assert failure is not None and failure.rank == 1
    assert "shard 1 of the holder is lost" in failure.reason
    with pytest.raises(WorkerFailedError):
        spread.service.snapshot()


def test_a_shard_that_comes_to_something_else_ends_the_run(made: list[Spread]) -> None:
    spread = Spread(2, workers=2, max_staleness=None)
    made.append(spread)
    spread.join(1)
    train(spread, 1, 1)
    (remote,) = spread.spread[0].remotes

    remote.tell(1, 999, CopyOut(1, 0, version=7, reads=False))

    failure = spread.latches[0].wait(10.0)
    assert failure is not None
    assert "OutOfStepError: rank 1 was to read version 7, and has read 1" in failure.reason


def test_a_host_that_has_made_another_model_is_named(made: list[Spread]) -> None:
    spread = Spread(2, workers=2, max_staleness=None)
    made.append(spread)
    (shard,), (remote,) = spread.shards, spread.spread[0].remotes
    spec = shard.server._serving[1]
    shard.offer(2, replace(spec, places=[0]))
    reported: list[int] = []
    link = remote.open(lambda place, answer: reported.append(place))

    with SharedPayload(spec) as payload:
        link.send(1000, Serve(payload.address))

    failure = spread.latches[0].wait(10.0)
    assert failure is not None and not reported
    assert "rank 1, on its host, has places [0], and rank 0 has" in failure.reason


def test_a_process_that_does_not_know_the_runs_token_is_not_let_in(made: list[Spread]) -> None:
    spread = Spread(2, workers=2, max_staleness=None)
    made.append(spread)
    address = spread.spread[0]._sites[0].address

    with pytest.raises(HandshakeError, match="does not know this run's token"):
        handshake(replace(address, token="another"), 1, CONTROL, follower=1)
    with pytest.raises(HandshakeError, match="a shard of the holder follows rank 0, once"):
        handshake(address, 0, SEQUENCER)
