"""An epoch stops exactly where DDP would validate, and its segments cover every ticket."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lightning_async.data.epoch_plan import EpochPlan, log_position

SINGLE = st.just(1)


@dataclass(frozen=True)
class Epoch:
    """An epoch as Lightning would see it under DDP."""

    plan: EpochPlan

    def stops(self) -> list[int]:
        """The tickets at which DDP would validate: after batch b of every rank, b * N batches in all."""
        plan = self.plan
        if plan.validate_every is None:
            return []
        stops = set()
        for batch in range(1, plan.batches + 1):
            if (plan.batches_before + batch) % plan.validate_every == 0:
                whole_updates = batch * plan.world_size // plan.block * plan.block
                stops.add(plan.tickets if batch == plan.batches else whole_updates)
        return sorted(stops - {0})


@st.composite
def epochs(draw: st.DrawFn, blocks: st.SearchStrategy[int] = SINGLE) -> Epoch:
    ranks = draw(st.integers(1, 6))
    global_batches = draw(st.integers(1, 60))
    batches = draw(st.integers(1, -(-global_batches // ranks)))
    return Epoch(
        EpochPlan(
            tickets=min(global_batches, batches * ranks),
            batches=batches,
            world_size=ranks,
            validate_every=draw(st.none() | st.integers(1, 20)),
            batches_before=draw(st.integers(0, 40)),
            block=draw(blocks),
        )
    )


def walk(plan: EpochPlan, start: int = 0) -> tuple[list[int], list[int]]:
    """The ends of the segments from ``start`` on, and those of them where validation is due."""
    ends, validations, done = [], [], start
    while done < plan.tickets:
        tickets = plan.until_stop(done)
        assert tickets > 0
        done += tickets
        ends.append(done)
        if plan.validation_due(done):
            validations.append(done)
    return ends, validations


@given(epoch=epochs())
def test_an_epoch_validates_exactly_where_ddp_would(epoch: Epoch) -> None:
    ends, validations = walk(epoch.plan)

    assert validations == epoch.stops()
    assert ends == sorted({*epoch.stops(), epoch.plan.tickets})


@given(epoch=epochs(blocks=st.integers(1, 5)))
def test_a_stop_never_cuts_an_update_in_two(epoch: Epoch) -> None:
    ends, validations = walk(epoch.plan)

    assert ends[-1] == epoch.plan.tickets
    assert all(end % epoch.plan.block == 0 for end in ends[:-1])
    assert validations == epoch.stops()
    # Wherever else a segment may be closed early, no validation is due.
    assert [end for end in range(1, epoch.plan.tickets + 1) if epoch.plan.validation_due(end)] == validations


@given(epoch=epochs(), data=st.data())
def test_an_epoch_that_is_resumed_or_left_early_stops_at_the_same_places(epoch: Epoch, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, epoch.plan.tickets))

    _, validations = walk(epoch.plan, start)

    assert validations == [stop for stop in epoch.stops() if stop > start]


@given(epoch=epochs())
def test_the_count_of_batches_is_that_of_ddp(epoch: Epoch) -> None:
    plan = epoch.plan
    counts = [plan.batches_done(tickets) for tickets in range(plan.tickets + 1)]

    assert counts == sorted(counts)
    # An epoch counts as complete only when it is: Lightning would end it early otherwise.
    assert [count == plan.batches for count in counts] == [False] * plan.tickets + [True]
    for batch in range(plan.batches):
        assert counts[batch * plan.world_size] == batch


@given(
    every=st.integers(2, 60),
    start=st.integers(0, 500),
    steps=st.lists(st.integers(0, 150), min_size=1, max_size=30),
)
def test_a_rank_logs_once_whenever_the_clock_has_passed_a_multiple(every: int, start: int, steps: list[int]) -> None:
    clock = start
    for step in steps:
        previous, clock = clock, clock + step
        position = log_position(previous, clock, every)

        logs = (position + 1) % every == 0
        assert logs is (clock // every > previous // every)
        # The x-axis never runs ahead of the clock, nor more than one interval behind.
        assert clock - every <= position <= clock


def test_nothing_is_logged_by_steps_where_that_is_off() -> None:
    assert [log_position(0, clock, every=0) for clock in (0, 1, 7)] == [0, 0, 6]


def test_a_batch_that_is_counted_and_not_there_is_not_computed() -> None:
    plan = EpochPlan(tickets=24, batches=9, world_size=3)

    assert [plan.batches_done(24), plan.batches_computed(24), plan.batches_computed(12)] == [9, 8, 4]
