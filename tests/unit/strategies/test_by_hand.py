"""What user code does by hand, in one process: its rhythm, counts that ranks share, schedules, leftovers."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_async.data.epoch_plan import tickets_until
from lightning_async.data.ledger import Ledger
from lightning_async.data.rhythm import Rhythm, usual_group
from lightning_async.holder.tally import Tally, add_counts
from lightning_async.loops.last_batch import LastBatch
from lightning_async.loops.phase import Phase
from lightning_async.strategies.module_wrapper import ModuleWrapper
from lightning_async.strategies.schedulers import SharedSchedulers, schedulers_in
from lightning_async.transport.fields import unpack_counts


def asynchronous() -> Phase:
    """The phase in which ranks train, without its guard over collectives."""
    phase = Phase()
    phase.is_asynchronous = True
    return phase


def optimizer() -> torch.optim.Optimizer:
    made: Any = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # Torch warns of a schedule that moves before its optimizer.
    made._opt_called = True
    return made  # type: ignore[no-any-return]


class Ranks:
    """Several ranks with a scheduler each, and the sums that they hear."""

    def __init__(self, make: Any, ranks: int, phase: Phase | None = None) -> None:
        self.totals: list[int] = [0]
        self.schedulers, self.shared, self.tallies = [], [], []
        for _ in range(ranks):
            own = optimizer()
            scheduler, tally, shared = make(own), Tally([0]), SharedSchedulers(ranks, 0, phase or asynchronous())
            shared.share([scheduler])
            shared.tally = tally
            self.schedulers.append(scheduler)
            self.shared.append(shared)
            self.tallies.append(tally)

    def exchange(self, rank: int) -> None:
        self.totals = add_counts(self.totals, unpack_counts(self.tallies[rank].take()))
        self.tallies[rank].hear(self.totals)
        self.shared[rank].catch_up()

    def meet(self) -> None:
        for _ in range(2):
            for rank in range(len(self.schedulers)):
                self.exchange(rank)


@given(calls=st.lists(st.integers(0, 2), max_size=48))
def test_a_schedule_is_where_the_calls_of_all_ranks_take_it_and_never_ahead(calls: list[int]) -> None:
    ranks = Ranks(lambda own: OneCycleLR(own, max_lr=1.0, total_steps=max(1, len(calls) // 3)), ranks=3)
    for position, rank in enumerate(calls, start=1):
        ranks.schedulers[rank].step()
        assert ranks.schedulers[rank].last_epoch <= position // 3
        ranks.exchange(rank)
    ranks.meet()

    assert [scheduler.last_epoch for scheduler in ranks.schedulers] == [len(calls) // 3] * 3


def test_where_the_ranks_meet_a_schedule_is_stepped_as_it_is_told() -> None:
    ranks = Ranks(lambda own: ExponentialLR(own, 0.5), ranks=2, phase=Phase())

    for scheduler in ranks.schedulers:
        scheduler.step()

    assert [scheduler.get_last_lr() for scheduler in ranks.schedulers] == [[0.5], [0.5]]


def test_a_call_that_names_the_place_in_the_schedule_is_made() -> None:
    ranks = Ranks(lambda own: LambdaLR(own, lambda epoch: 1.0 / (1 + epoch)), ranks=2)

    with pytest.warns(UserWarning, match="deprecated"):
        ranks.schedulers[0].step(3)

    assert ranks.schedulers[0].get_last_lr() == [0.25]


def test_a_plateau_steps_by_the_value_that_its_rank_knows() -> None:
    ranks = Ranks(lambda own: ReduceLROnPlateau(own, factor=0.1, patience=0), ranks=2)
    for value in (1.0, 2.0):
        for rank in (0, 1):
            ranks.schedulers[rank].step(value)
            ranks.exchange(rank)
    ranks.meet()

    assert [scheduler.num_bad_epochs + scheduler.last_epoch for scheduler in ranks.schedulers] == [2, 2]
    assert [scheduler.optimizer.param_groups[0]["lr"] for scheduler in ranks.schedulers] == [0.1, 0.1]
    assert ranks.shared[0].plateaus == [ranks.schedulers[0]]


def test_a_schedule_of_schedules_steps_those_that_it_has() -> None:
    own = optimizer()
    parts: list[LRScheduler] = [LinearLR(own, 0.5, total_iters=1), ConstantLR(own, 1.0)]
    whole = SequentialLR(own, parts, milestones=[1])
    shared = SharedSchedulers(1, 0, asynchronous())
    shared.share([whole, *parts])
    shared.tally = Tally([0, 0, 0])

    whole.step()

    assert own.param_groups[0]["lr"] == 1.0
    assert shared.made == [1, 0, 0]


def test_a_shared_scheduler_is_saved_and_copied_as_the_user_made_it() -> None:
    scheduler = ExponentialLR(optimizer(), 0.5)
    plain = ExponentialLR(optimizer(), 0.5).state_dict()
    shared = SharedSchedulers(2, 0, Phase())
    shared.share([scheduler])

    copied, sent = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))
    state = scheduler.state_dict()
    shared.release()

    assert isinstance(scheduler, ExponentialLR)
    assert type(copied) is type(sent) is type(scheduler) is ExponentialLR
    assert state == plain


def test_schedulers_are_found_by_their_optimizer() -> None:
    mine, other = optimizer(), optimizer()
    found = [ExponentialLR(mine, 0.5), ExponentialLR(mine, 0.5)]
    values = {"a": found[0], "b": [found[1], ExponentialLR(other, 0.5)], "c": 3, "d": {"e": "text"}}

    assert [*schedulers_in(values, [mine])] == found


def test_batches_without_a_step_show_no_rhythm_by_themselves() -> None:
    rhythm = Rhythm()
    for batch in range(10):
        rhythm.begin_batch()
        if batch != 4:
            rhythm.step()
            rhythm.step()

    assert rhythm.seen == ({1: 7, 2: 1}, {1: 1}, 2)
    assert usual_group([rhythm.seen]) == 1


@given(
    max_steps=st.integers(1, 40),
    ranks=st.integers(1, 8),
    steps=st.integers(1, 3),
    block=st.integers(1, 5),
    data=st.data(),
)
def test_what_is_left_until_max_steps_is_what_ddp_would_compute(
    max_steps: int, ranks: int, steps: int, block: int, data: st.DataObject
) -> None:
    groups = ranks * -(-max_steps // steps)
    done = data.draw(st.integers(0, groups - 1))

    assert tickets_until(max_steps, done * steps, ranks, steps, block) == (groups - done) * block


def test_what_is_left_of_an_epoch_is_dealt_anew() -> None:
    ledger = Ledger(workers=2, batches="shared")
    ledger.begin_epoch(range(12))
    ledger.regroup(1, equal_shares=True)
    ledger.open(12)
    alone = [ticket for _ in range(3) for ticket in ledger.draw(1)]
    ledger.complete(1, [range(ticket, ticket + 1) for ticket in alone])

    ledger.regroup(4, equal_shares=False)
    ledger.open(9)

    assert alone == [1, 3, 5]
    assert [[*ledger.draw(0)], [*ledger.draw(1)]] == [[0], [2]]
    assert [[*ledger.draw(0)] for _ in range(3)] == [[4], [6, 7], [8, 9, 10, 11]]


class OwnBar(TQDMProgressBar):
    def on_train_batch_end(self, *arguments: Any) -> None:
        """Looks at the batch."""


def test_user_code_gets_the_last_batch_once_and_lightnings_own_gets_none() -> None:
    module, trainer, told = SimpleNamespace(), SimpleNamespace(), []

    def hook(*arguments: Any) -> None:
        told.append(arguments[2:])

    callbacks: list[Callback] = [OwnBar(), TQDMProgressBar(), ModelCheckpoint()]
    for callback in callbacks:
        last: Any = LastBatch(callback)
        last.keep({"loss": 1.0}, [1, 2], 7)
        told.append((last.show(hook, trainer, module), last.show(hook, trainer, module)))

    own, lightnings = ({"loss": 1.0}, [1, 2], 7), (None, None, 0)
    assert told == [own, (True, False), lightnings, lightnings, (True, True), lightnings, lightnings, (True, True)]


def test_a_wrapper_is_what_ddp_code_expects_and_can_be_copied() -> None:
    network = nn.Sequential(nn.Linear(2, 1))
    wrapper: Any = ModuleWrapper(network)

    with wrapper.no_sync():
        loss = wrapper(torch.ones(1, 2))

    assert wrapper.module is network
    assert torch.equal(loss, network(torch.ones(1, 2)))
    assert [*copy.deepcopy(wrapper).state_dict()] == ["module.0.weight", "module.0.bias"]
    assert [*network.state_dict()] == ["0.weight", "0.bias"]
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wrapper.nothing_of_the_kind
