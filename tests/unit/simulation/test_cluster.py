"""The event queue: who reads when, what waits, and what a stop leaves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.monitoring.replay import replay
from lightning_async.simulation.cluster import ExchangeTimes, VirtualCluster, play
from lightning_async.simulation.sink import BarrierSink, Delivery, GradientSink
from lightning_async.simulation.step_times import StepTimes

SECONDS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 4.0])


def barrier_of(bound: int | None, on_stale: Any = "wait", gradients_per_update: int = 1) -> StalenessBarrier:
    return StalenessBarrier(bound, on_stale, gradients_per_update=gradients_per_update)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.sampled_from([0.5, 1.0, 1.25, 3.0, 7.0]), min_size=1, max_size=9),
    bound=st.one_of(st.none(), st.integers(0, 12)),
    on_stale=st.sampled_from(["wait", "drop"]),
    k=st.integers(1, 10),
    push=SECONDS,
    pull=SECONDS,
    update=SECONDS,
    stops=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_every_batch_is_taken_once_none_too_stale_and_nothing_hangs(
    steps: list[float], bound: Any, on_stale: Any, k: int, push: float, pull: float, update: float, stops: list[int]
) -> None:
    barrier = barrier_of(bound, on_stale, k)
    sink = BarrierSink(barrier)
    cluster = VirtualCluster(StepTimes.of(steps), sink, ExchangeTimes(push, pull, update))
    read = 0

    for batches in stops:
        cluster.start()
        for _ in range(batches):
            before = cluster.progress.now
            cluster.read()
            assert cluster.progress.now >= before
            cluster.computed()
            read += 1
        cluster.settle()
        assert not barrier.outstanding
        assert not barrier.waiting
        assert sink.staleness.total() + sink.dropped == read == sum(cluster.progress.steps)

    assert bound is None or max(sink.staleness) <= bound
    assert on_stale == "drop" or not sink.dropped
    assert cluster.progress.busy == pytest.approx(update * sink.staleness.total())
    assert all(0.0 <= cluster.progress.waiting(worker) <= 1.0 + 1e-9 for worker in range(len(steps)))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.floats(0.5, 5.0), min_size=2, max_size=6), k=st.integers(1, 6))
def test_without_a_bound_it_agrees_with_the_replay_of_a_run(steps: list[float], k: int) -> None:
    expected = replay([[own] for own in steps], None, updates=300, gradients_per_update=k)

    cluster, sink = play(StepTimes.of(steps), barrier_of(None, gradients_per_update=k), batches=300)

    # The one ends with its 300th gradient, the other with the last of 300 reads.
    assert cluster.progress.now == pytest.approx(expected.seconds, abs=3 * max(steps))
    apart = sum((sink.staleness - expected.staleness).values()) / 300
    assert apart < 0.1


def test_requests_that_were_held_back_are_served_in_the_order_of_their_arrival() -> None:
    barrier = barrier_of(1, gradients_per_update=2)
    cluster = VirtualCluster(StepTimes.of([20, 20.5, 21, 80]), BarrierSink(barrier))
    cluster.start()
    order = []

    for _ in range(12):
        order.append((cluster.progress.now, cluster.read()))
        cluster.computed()

    # At 80 the slow worker's gradient lets go, in turn, the third's question of 21, the first two's gradients of 40 and
    # 41, and its own question.
    assert [reader for _, reader in order] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 2]
    assert cluster.progress.now == 101.0


def test_lock_step_takes_the_slowest_workers_time_and_both_ways() -> None:
    times = ExchangeTimes(push=0.5, pull=0.25, update=0.125)

    cluster, sink = play(StepTimes.of([1.0, 2.0, 4.0]), barrier_of(0, gradients_per_update=3), 30, times)

    # The last gradient's update is in each round; the others' are done while it is computed.
    assert cluster.progress.now == pytest.approx(10 * (4.0 + 0.5 + 0.25 + 0.125))
    assert sink.staleness == Counter({0: 30})
    assert [cluster.progress.waiting(worker) for worker in range(3)] == pytest.approx(
        [1 - own / 4.875 for own in (1.0, 2.0, 4.0)]
    )


def test_equal_workers_make_gradients_as_stale_as_there_are_others() -> None:
    _, sink = play(StepTimes.of(1.0, workers=5), barrier_of(None), 500)

    assert sink.staleness[4] > 480
    assert max(sink.staleness) == 4


def test_a_holder_that_is_slower_than_the_workers_sets_the_pace() -> None:
    cluster, _ = play(StepTimes.of(1.0, workers=20), barrier_of(None), 1000, ExchangeTimes(update=0.1))

    assert cluster.progress.now == pytest.approx(100.0, rel=0.02)
    assert cluster.progress.load > 0.98
    assert cluster.progress.waiting(0) == pytest.approx(0.5, abs=0.02)


def test_a_stop_in_the_middle_of_an_update_keeps_its_worker_and_a_forgotten_one_leaves() -> None:
    barrier = barrier_of(None)
    cluster = VirtualCluster(StepTimes.of([1.0, 1.0]), BarrierSink(barrier))
    cluster.start()
    cluster.read()
    cluster.computed()
    assert cluster.read() == 1

    cluster.settle()
    cluster.start()

    assert (cluster.computing, barrier.outstanding) == (1, {1: 0})
    assert (barrier.version, cluster.version_read) == (1, 0)
    cluster.abandon()
    assert not barrier.outstanding


def test_a_step_without_a_gradient_takes_its_time_and_brings_nothing() -> None:
    barrier = barrier_of(0)
    cluster = VirtualCluster(StepTimes.of([2.0]), BarrierSink(barrier))
    cluster.start()
    cluster.read()

    cluster.computed(batches=3, has_gradient=False)
    cluster.advance()

    assert (cluster.progress.now, cluster.progress.steps, barrier.version) == (6.0, [3], 0)


def test_a_policy_under_which_nothing_goes_on_is_named() -> None:
    class Stubborn(GradientSink):
        def ask(self, worker: int) -> None: ...

        def may_read(self, worker: int) -> bool:
            return True

        def read(self, worker: int) -> int:
            return 0

        def push(self, delivery: Delivery, parked: float) -> None:
            return None

        def leave(self, worker: int) -> None: ...

    cluster = VirtualCluster(StepTimes.of([1.0]), Stubborn())
    cluster.start()
    cluster.read()
    cluster.computed()

    with pytest.raises(RuntimeError, match="1 gradients wait: its staleness policy lets neither a gradient through"):
        cluster.advance()
    with pytest.raises(RuntimeError, match="staleness policy"):
        cluster.settle()


@pytest.mark.parametrize("name", ["push", "pull", "update"])
def test_an_exchange_of_no_number_of_seconds_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}_seconds takes a number of seconds of at least 0, not inf"):
        ExchangeTimes(**{name: float("inf")})


@pytest.mark.parametrize(("bound", "gradients_per_update"), [(1, 1), (3, 1), (6, 1), (9, 1), (1, 2), (None, 1)])
def test_a_bound_costs_here_what_the_diagnosis_says(bound: int | None, gradients_per_update: int) -> None:
    slow = [{"mean": mean, "spread": 0.1, "distribution": "lognormal"} for mean in (1, 1, 1, 4)]
    steps = StepTimes.of(slow)
    recorded = [[steps.draw(worker, number) for number in range(1000)] for worker in range(4)]

    cluster, _ = play(steps, StalenessBarrier(bound, gradients_per_update=gradients_per_update), 2000)
    replayed = replay(recorded, bound, 2000, gradients_per_update=gradients_per_update)

    assert 2000 / cluster.progress.now == pytest.approx(replayed.staleness.total() / replayed.seconds, rel=0.02)
