"""To its callers a holder with shards is one holder: what is read, loaded and gone on from is the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async import AMSGrad
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.held_state import same_state
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.types import HalfUpdatedError, Push
from lightning_async.policies.damping import AgeDamping
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.shards import operations as told
from lightning_async.shards.follower import OutOfStepError
from lightning_async.transport.message import Abort, Parameters
from tests.unit.shards.rig import Rig, parameters_of

SHAPES = [(5, 11), (3,), (40,)]
ANY = ExchangeOptions(max_staleness=None)


class Run:
    """One worker at a holder with shards and at a plain one."""

    def __init__(self, shards: int = 3, options: ExchangeOptions = ANY, seed: int = 0, kind: Any = AMSGrad) -> None:
        self.parameters: list[nn.Parameter] = parameters_of(SHAPES, seed)
        first, *others = self.parameters
        self.optimizer: torch.optim.Optimizer = kind([{"params": [first], "lr": 0.5}, {"params": others}], lr=0.05)
        self.rig = Rig(self.optimizer, shards, 2, options)
        self.buffers = self.rig.attach(1)
        self.groups = tuple(HyperparamLayout(self.optimizer).read(self.optimizer.param_groups))
        self.generator = torch.Generator().manual_seed(7)

    @property
    def holders(self) -> tuple[Any, Any]:
        return self.rig.sharded, self.rig.plain

    def train(self, steps: int, worker: int = 1) -> None:
        sharded, plain = self.holders
        for _ in range(steps):
            version = sharded.try_pull(worker, self.buffers.parameters)
            assert plain.try_pull(worker, torch.zeros(self.rig.layout.numel)) == version
            gradient = self.buffers.gradient
            gradient.copy_(torch.randn(gradient.shape, generator=self.generator))
            views: list[Tensor | None] = [*self.rig.layout.views(gradient, 0)]
            push = Push(worker, 0, version, views, self.groups, samples=5, flat=gradient)
            assert sharded.try_push(push) is not None and plain.try_push(push) is not None

    def assert_same(self) -> None:
        ours, theirs = (holder.snapshot() for holder in self.holders)
        assert ours.version == theirs.version
        assert torch.equal(ours.parameters, theirs.parameters)
        assert ours.optimizer_states[0]["param_groups"] == theirs.optimizer_states[0]["param_groups"]
        assert same_state(ours.optimizer_states[0]["state"], theirs.optimizer_states[0]["state"])
        assert ours.adapted == theirs.adapted and ours.policy == theirs.policy
        out = torch.zeros(self.rig.layout.numel)
        self.rig.plain.read(out)
        assert self.rig.sharded.read(self.buffers.parameters) == theirs.version
        assert torch.equal(self.buffers.parameters, out)


@pytest.mark.parametrize("kind", [AMSGrad, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_it_steps_as_a_plain_holder_does(kind: Any) -> None:
    run = Run(kind=kind)

    run.train(5)

    run.assert_same()
    assert same_state(run.rig.sharded.optimizer_state(0), run.rig.plain.optimizer_state(0))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_snapshot_is_gone_on_from_with_another_number_of_shards(shards: int) -> None:
    options = ExchangeOptions(max_staleness=None, gradients_per_update=2, staleness_policy="damping")
    before, after = Run(3, options), Run(shards, options, seed=1)
    before.train(5)
    taken = before.rig.sharded.snapshot()

    for holder in after.holders:
        values = [[*after.rig.layout.views(taken.parameters, 0)]]
        holder.load_parameters(values)
        holder.restore(taken.version, taken.optimizer_states, taken.gathered, taken.policy)
    after.train(3)

    assert taken.gathered is not None and taken.gathered.count == 1
    after.assert_same()


def test_states_and_rules_that_change_where_ranks_meet_change_in_every_shard() -> None:
    options = ExchangeOptions(max_staleness=None, gradients_per_update=2)
    run = Run(3, options)
    run.train(3)
    state = {
        place: {key: value + 1 for key, value in entry.items()}
        for place, entry in run.rig.plain.optimizer_state(0).items()
    }

    completed = [holder.complete_version() for holder in run.holders]
    for holder in run.holders:
        holder.load_states([state])
        holder.take_adapted()
        policy = AgeDamping()
        policy.bind(2, 1)
        holder.adjust(4, "wait", 1, policy, None)
    run.train(3)

    assert completed == [True, True]
    run.assert_same()


def test_a_state_of_other_param_groups_is_refused() -> None:
    run = Run()
    state = run.rig.plain.snapshot().optimizer_states[0]
    groups = state["param_groups"]

    with pytest.raises(ValueError, match="different number of parameter groups"):
        run.rig.sharded.restore(0, [{**state, "param_groups": groups[:1]}])
    with pytest.raises(ValueError, match="doesn't match the size"):
        run.rig.sharded.restore(0, [{**state, "param_groups": [groups[0], {**groups[1], "params": [1]}]}])


def test_a_worker_that_is_gone_may_come_again_with_other_memory() -> None:
    run = Run(2, ExchangeOptions(max_staleness=0))
    assert run.rig.sharded.try_pull(1, run.buffers.parameters) == 0

    for holder in run.holders:
        holder.leave(1)
    run.buffers = run.rig.attach(1)
    run.train(3)

    run.assert_same()


def test_a_holder_that_takes_anothers_place_finds_what_that_has() -> None:
    run = Run(2)
    run.train(3)
    former = run.rig.sharded

    placement: Any = type(run.rig.placement)
    next_placement = placement(run.rig.processes, ANY, 2)
    flat = torch.zeros(run.rig.layout.numel)
    holder = next_placement.make_holder(run.rig.layout, flat, [run.optimizer], run.rig._barrier(0), run.rig.latch)

    assert torch.equal(former.snapshot().parameters, run.rig.plain.snapshot().parameters)
    assert torch.equal(holder.snapshot().parameters, flat)


def test_a_small_model_has_no_shards() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)

    rig = Rig(optimizer, 4, 2, ANY)

    assert type(rig.sharded) is type(rig.plain)


def test_a_follower_that_comes_to_something_else_says_so() -> None:
    run = Run(2)
    run.train(1)
    (process,) = run.rig.processes

    with pytest.raises(OutOfStepError, match="rank 1 was to read version 7, and has read 1"):
        process._host.do(1, 99, told.CopyOut(1, 0, 7, reads=False))


def test_a_worker_whose_answer_waits_for_a_shard_is_told_of_the_end() -> None:
    run = Run(2)
    (process,) = run.rig.processes
    process.at_once = False
    version = run.rig.sharded.try_pull(1, run.buffers.parameters)
    channel = run.rig.channels[1, 0]
    run.rig.placement.deliver(channel, Parameters(1, version), run.buffers.parameters)
    assert not channel.sent

    run.rig.latch.trip(RunFailure(0, "its process for shard 1 of the holder was killed by SIGKILL"))

    assert channel.sent == [Abort(0, "its process for shard 1 of the holder was killed by SIGKILL")]
    with pytest.raises(WorkerFailedError, match="shard 1"):
        run.rig.sharded.wait_until_copied(run.buffers.parameters)
    with pytest.raises(WorkerFailedError, match="shard 1"):
        run.rig.sharded.snapshot()


def test_what_comes_in_the_middle_of_an_update_sees_no_half_of_it() -> None:
    run = Run(2)
    run.train(1)
    (process,) = run.rig.processes
    said: list[str] = []

    def interrupt() -> None:
        # In the same thread, as a signal's handler does.
        for ask in (run.rig.sharded.snapshot, lambda: run.rig.sharded.read(run.buffers.parameters)):
            with pytest.raises(RuntimeError) as error:
                ask()
            said.append(str(error.value))

    process.on_push = interrupt
    run.train(1)

    assert "first shard is one update ahead of the others" in said[0]
    assert "were to CopyOut while this thread told them something else" in said[1]
    run.assert_same()


def test_no_update_comes_after_one_that_the_other_shards_were_not_told_of() -> None:
    run = Run(2)
    run.train(1)
    (process,) = run.rig.processes

    def interrupt() -> None:
        raise KeyboardInterrupt

    process.on_push = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.train(1)
    process.on_push = lambda: None

    sharded = run.rig.sharded
    version = sharded.try_pull(1, run.buffers.parameters)
    views: list[Tensor | None] = [*run.rig.layout.views(run.buffers.gradient, 0)]
    with pytest.raises(HalfUpdatedError, match="ahead of the others"):
        sharded.try_push(Push(1, 0, version, views, run.groups, flat=run.buffers.gradient))
    with pytest.raises(HalfUpdatedError, match="ahead of the others"):
        sharded.snapshot()
