"""What user code sees in ``optimizer.state`` during a fit: the holder's, fetched on first use; what it may change."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async import AMSGrad
from lightning_async.exchange.engine import Engine
from lightning_async.holder.held_state import OptimizerStateError, same_state
from lightning_async.holder.optimizer_state import OptimizerStates
from tests.unit.exchange.test_engine import make_engine, train


class Rank:
    """An optimizer on a rank, and a holder that has made some steps; counts how often its state was fetched."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.zeros(2))
        self.optimizer = AMSGrad([self.parameter])
        self.steps = 3.0
        self.fetched = 0
        self.version = 3
        self.states = OptimizerStates([self.optimizer], self._fetch, lambda: self.version)

    def _fetch(self, index: int) -> dict[int, Any]:
        self.fetched += 1
        return {0: {"step": torch.tensor(self.steps), "exp_avg": torch.full((2,), self.steps)}}


@pytest.fixture
def rank() -> Rank:
    return Rank()


READS: list[Callable[[Any], Any]] = [
    len,
    bool,
    list,
    dict,
    repr,
    copy.copy,
    copy.deepcopy,
    pickle.dumps,
    lambda state: {**state},
    lambda state: state.copy(),
    lambda state: state | {},
    lambda state: {} | state,
    lambda state: list(state.keys()),
    lambda state: list(state.values()),
    lambda state: list(state.items()),
    lambda state: list(reversed(state)),
    lambda state: state == {},
    lambda state: state != {},
    lambda state: nn.Parameter() in state,
    lambda state: state.get(0),
]


@pytest.mark.parametrize("read", READS, ids=[str(index) for index in range(len(READS))])
def test_a_state_is_fetched_when_somebody_looks_and_not_before(rank: Rank, read: Callable[[Any], Any]) -> None:
    rank.states.begin_segment()
    rank.states.end_segment()
    assert rank.fetched == 0

    read(rank.optimizer.state)
    read(rank.optimizer.state)

    assert rank.fetched == 1
    assert [*rank.optimizer.state] == [rank.parameter]


def test_what_torch_makes_of_it_is_what_the_holder_has(rank: Rank) -> None:
    assert rank.optimizer.state_dict()["state"][0]["step"] == 3
    assert rank.optimizer.state[rank.parameter]["exp_avg"].tolist() == [3.0, 3.0]
    assert type(copy.deepcopy(rank.optimizer).state) is defaultdict


def test_what_was_fetched_in_a_segment_is_as_new_as_the_parameters(rank: Rank) -> None:
    rank.states.begin_segment()
    assert rank.optimizer.state[rank.parameter]["step"] == 3
    rank.steps = 5.0
    assert rank.optimizer.state[rank.parameter]["step"] == 3
    rank.version = 5
    assert rank.optimizer.state[rank.parameter]["step"] == 5
    rank.steps = 6.0
    rank.states.end_segment()
    assert rank.optimizer.state[rank.parameter]["step"] == 6
    rank.states.begin_segment()
    rank.states.end_segment()
    assert (rank.optimizer.state[rank.parameter]["step"], rank.fetched) == (6, 4)


def clear(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def put(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {}


def load(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})


def assign(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def zero_in_place(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].data.zero_()


def add_a_value(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["mine"] = 1


CHANGES = [clear, put, load, assign, zero_in_place, add_a_value]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_a_segment_is_refused(rank: Rank, change: Callable[[Any], None]) -> None:
    rank.states.begin_segment()

    with pytest.raises(OptimizerStateError, match=r"of AMSGrad was changed between two batches.*on_train_epoch_start"):  # noqa: PT012
        change(rank.optimizer)
        rank.states.check_untouched()
        rank.states.end_segment()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_where_the_ranks_meet_is_told(rank: Rank, change: Callable[[Any], None]) -> None:
    assert rank.states.changes() == [None]

    change(rank.optimizer)

    (changed,) = rank.states.changes()
    assert changed is not None
    assert not same_state(rank._fetch(0), changed)


def test_reading_changes_nothing(rank: Rank) -> None:
    assert rank.optimizer.state[rank.parameter]
    assert rank.optimizer.state["something else"] == {}

    (shown,) = rank.states.changes()
    assert same_state(rank._fetch(0), shown)


def test_whoever_looks_where_the_state_is_not_is_told_where_it_is(rank: Rank) -> None:
    rank.states.release(None, "it is on rank 0")

    with pytest.raises(OptimizerStateError, match="it is on rank 0"):
        rank.optimizer.state_dict()
    rank.optimizer.load_state_dict({"state": {}, "param_groups": [{**rank.optimizer.defaults, "params": [0]}]})
    assert rank.optimizer.state == {}


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((3,), 1.0)), nn.Parameter(torch.full((2, 2), 1.0))]


def steps_of(engine: Engine) -> list[int]:
    snapshot = engine.snapshot()
    assert snapshot is not None
    return [int(state["step"]) for _, state in sorted(snapshot.optimizer_states[0]["state"].items())]


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def test_the_holder_goes_on_with_what_was_made_of_the_state(
    parameters: list[nn.Parameter], engines: list[Engine]
) -> None:
    optimizer = AMSGrad(parameters)
    engine = make_engine(optimizer)
    engines.append(engine)
    train(engine, parameters, steps=3)
    assert [int(state["step"]) for state in optimizer.state.values()] == [3, 3]

    del optimizer.state[parameters[0]]
    optimizer.state[parameters[1]]["exp_avg"].zero_()
    engine.load_states()
    engine.states.begin_segment()
    engine.states.end_segment()

    assert [*optimizer.state] == [parameters[1]]
    assert not optimizer.state[parameters[1]]["exp_avg"].any()
    train(engine, parameters, steps=2)
    assert steps_of(engine) == [2, 5]


def test_a_state_that_was_only_looked_at_is_not_loaded_again(
    parameters: list[nn.Parameter], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = AMSGrad(parameters)
    engine = make_engine(optimizer)
    engines.append(engine)
    train(engine, parameters, steps=3)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("nothing has changed")

    monkeypatch.setattr(AMSGrad, "load_state_dict", refuse)
    assert optimizer.state_dict()["state"]
    engine.load_states()


def test_a_state_that_an_optimizer_comes_with_is_the_holders(
    parameters: list[nn.Parameter], engines: list[Engine]
) -> None:
    before = torch.optim.Adam(parameters, amsgrad=True)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        before.step()
    optimizer = torch.optim.Adam(parameters, amsgrad=True)
    optimizer.load_state_dict(before.state_dict())

    engine = make_engine(optimizer)
    engines.append(engine)

    assert steps_of(engine) == [4, 4]
    train(engine, parameters, steps=1)
    assert steps_of(engine) == [5, 5]


def test_a_replaced_optimizer_has_the_state_that_it_has_and_the_one_before_keeps_its_own(
    parameters: list[nn.Parameter], engines: list[Engine]
) -> None:
    first, second = AMSGrad(parameters), torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    current = make_engine(first)
    train(current, parameters, steps=3)

    def follow(optimizer: torch.optim.Optimizer) -> Engine:
        assert not current.owns([optimizer])
        current.release_states(kept=[optimizer])
        current.close()
        return make_engine(optimizer, current.worker.version, predecessor=current)

    current = follow(second)
    train(current, parameters, steps=2)
    assert [int(state["step"]) for state in first.state.values()] == [3, 3]
    assert len(second.state) == 2
    current = follow(first)
    engines.append(current)
    train(current, parameters, steps=4)

    assert [int(state["step"]) for state in first.state.values()] == [7, 7]
    assert current.worker.version == 9
    assert "momentum_buffer" in second.state[parameters[0]]


def test_a_change_and_an_added_group_come_together(parameters: list[nn.Parameter], engines: list[Engine]) -> None:
    optimizer = AMSGrad(parameters[:1])
    first = make_engine(optimizer)
    train(first, parameters[:1], steps=3)

    optimizer.state[parameters[0]]["step"].fill_(1)
    optimizer.add_param_group({"params": parameters[1:]})
    first.release_states(kept=[optimizer])
    first.close()
    engine = make_engine(optimizer, first.worker.version, predecessor=first)
    engines.append(engine)
    train(engine, parameters, steps=2)

    assert steps_of(engine) == [3, 2]


class Adapting(torch.optim.SGD):
    """Halves a number of its own at each step, and steps by it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1.0)
        for group in self.param_groups:
            group["d"] = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["d"] /= 2
            for parameter in group["params"]:
                parameter -= group["lr"] * group["d"] * parameter.grad


def test_values_that_steps_adapt_are_shown_and_go_on_from_there(
    parameters: list[nn.Parameter], engines: list[Engine]
) -> None:
    optimizer = Adapting(parameters)
    engine = make_engine(optimizer)
    engines.append(engine)

    for seen in (0.25, 0.0625):
        train(engine, parameters, steps=2)
        adapted = engine.take_adapted()
        assert adapted is not None
        engine.show_adapted(adapted)
        assert optimizer.param_groups[0]["d"] == seen
    optimizer.param_groups[0]["d"] = 8.0
    train(engine, parameters, steps=1)

    snapshot = engine.snapshot()
    assert snapshot is not None
    assert snapshot.adapted[0][0] == {"d": 4.0}


@pytest.mark.parametrize("kind", [AMSGrad, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_what_cannot_have_a_gradient_is_left_out_and_an_empty_group_is_skipped(
    engines: list[Engine], parameters: list[nn.Parameter], kind: Any
) -> None:
    codes = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    phases = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    options = {"amsgrad": True} if kind is torch.optim.AdamW else {}
    groups = [
        {"params": [codes, parameters[0]], "weight_decay": 0.1},
        {"params": []},
        {"params": [phases]},
        {"params": [parameters[1]], "lr": 0.5},
    ]
    optimizer = kind(groups, lr=0.1, **options)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    twin = kind(
        [{"params": twins[:1], "weight_decay": 0.1}, {"params": twins[1:], "lr": 0.5}],
        lr=0.1,
        **(options if kind is AMSGrad else {**options, "foreach": True}),
    )
    engine = make_engine(optimizer)
    engines.append(engine)

    train(engine, parameters, steps=2)
    for _ in range(2):
        for parameter in twins:
            parameter.grad = torch.ones_like(parameter)
        twin.step()

    assert codes.tolist() == [0, 1, 2, 3]
    for parameter, other in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, other)
    assert {*optimizer.state} <= {*parameters}


def test_a_state_is_shown_in_the_memory_order_of_its_parameter() -> None:
    # Torch's fused kernels rely on that, of a checkpoint that is gone on with on a single device, too.
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = AMSGrad([parameter])
    kept = torch.arange(96.0).view(2, 3, 4, 4)

    states = OptimizerStates([optimizer], lambda index: {0: {"step": torch.tensor(1.0), "exp_avg": kept}}, lambda: 1)

    shown = optimizer.state[parameter]["exp_avg"]
    assert torch.equal(shown, kept) and shown.stride() == parameter.stride() != kept.stride()
    # To look at it is no change.
    assert same_state({0: {"step": torch.tensor(1.0), "exp_avg": kept}}, states.changes()[0])
