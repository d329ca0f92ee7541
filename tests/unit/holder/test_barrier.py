"""The staleness barrier, call by call, and a simulated cluster that is driven through it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import Decision
from tests.unit.holder.test_staleness import in_time_in_some_order, no_window_is_overfull


def barrier_with(reads: Sequence[int], tau: int | None, on_stale: str = "wait") -> StalenessBarrier:
    """Worker i holds parameters of version reads[i]; reads ascend, and helper worker -1 moves the version."""
    barrier = StalenessBarrier(tau, on_stale)  # type: ignore[arg-type]
    for worker, read in enumerate(reads):
        while barrier.version < read:
            barrier.ask(-1)
            barrier.read(-1)
            barrier.apply(-1)
        barrier.ask(worker)
        barrier.read(worker)
    return barrier


def test_a_push_waits_until_an_older_one_has_been_applied() -> None:
    barrier = barrier_with([0, 0, 0], tau=2)
    barrier.apply(0)
    barrier.ask(0)
    assert barrier.read(0) == 1

    assert barrier.decision(0) is Decision.WAIT
    assert barrier.apply(2) == 1
    assert barrier.decision(0) is Decision.WAIT
    assert barrier.apply(1) == 2
    assert barrier.decision(0) is Decision.APPLY
    assert barrier.apply(0) == 2
    assert (barrier.version, barrier.outstanding) == (4, {})


def test_readers_are_served_in_the_order_of_their_asking() -> None:
    barrier = barrier_with([0], tau=0)
    for worker in (7, 5, 7, 6):
        barrier.ask(worker)
    assert list(barrier.waiting) == [7, 5, 6]
    assert not barrier.may_read(7)

    barrier.apply(0)

    assert [worker for worker in (5, 6, 7) if barrier.may_read(worker)] == [7]
    with pytest.raises(ValueError, match="Worker 5 may not read"):
        barrier.read(5)
    assert barrier.read(7) == 1
    assert list(barrier.waiting) == [5, 6]


def test_a_reader_that_leaves_makes_room_in_the_queue() -> None:
    barrier = barrier_with([0], tau=1)
    barrier.ask(1)
    barrier.ask(2)

    barrier.leave(1)

    assert barrier.may_read(2)


def test_a_worker_that_leaves_frees_those_who_wait_for_it() -> None:
    barrier = barrier_with([0, 0], tau=1)
    barrier.apply(0)
    barrier.ask(0)
    barrier.read(0)
    assert barrier.decision(0) is Decision.WAIT

    barrier.leave(1)
    barrier.leave(1)

    assert barrier.decision(0) is Decision.APPLY


def test_drop_discards_what_is_past_the_bound_and_counts_no_update() -> None:
    barrier = barrier_with([0, 0, 0], tau=1, on_stale="drop")
    barrier.apply(0)
    barrier.apply(1)

    assert barrier.decision(2) is Decision.DROP
    assert barrier.discard(2) == 2
    assert (barrier.version, barrier.outstanding) == (2, {})


def test_nobody_has_to_ask_where_nobody_waits() -> None:
    assert StalenessBarrier(0, "drop").read(3) == 0
    assert StalenessBarrier(None).read(3) == 0


def test_the_version_is_set_only_while_nobody_is_outstanding() -> None:
    barrier = StalenessBarrier(2, version=5)
    barrier.version = 40
    barrier.ask(0)
    assert barrier.read(0) == 40

    with pytest.raises(ValueError, match=r"workers \[0\]"):
        barrier.version = 3
    assert barrier.version == 40


def test_a_version_is_made_of_as_many_gradients_as_it_takes() -> None:
    barrier = StalenessBarrier(0, gradients_per_update=3)
    for worker in (0, 1, 2, 3):
        barrier.ask(worker)

    assert [barrier.read(worker) for worker in (0, 1, 2)] == [0, 0, 0]
    assert not barrier.may_read(3)
    assert [barrier.apply(worker) for worker in (2, 0)] == [0, 0]
    assert (barrier.version, barrier.filled) == (0, 2)
    assert not barrier.may_read(3)
    barrier.apply(1)
    assert (barrier.version, barrier.filled) == (1, 0)
    assert barrier.read(3) == 1


def test_a_version_is_completed_with_what_there_is_when_nobody_computes() -> None:
    barrier = StalenessBarrier(None, gradients_per_update=3)
    for worker in (0, 1):
        barrier.ask(worker)
        barrier.read(worker)
    barrier.apply(0)

    with pytest.raises(ValueError, match="A version cannot be set while workers"):
        barrier.complete()
    barrier.apply(1)
    barrier.complete()

    assert (barrier.version, barrier.filled) == (1, 0)
    with pytest.raises(ValueError, match="no version to complete"):
        barrier.complete()
    with pytest.raises(ValueError, match="3 gradients make a version, so 3 cannot wait"):
        barrier.filled = 3


def test_outstanding_is_a_copy() -> None:
    barrier = barrier_with([0], tau=1)
    dict(barrier.outstanding).clear()
    barrier.outstanding.clear()  # type: ignore[attr-defined]

    assert barrier.outstanding == {0: 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "max_staleness"),
        ((True,), "max_staleness"),
        ((2, "ignore"), "on_stale"),
        ((2, "wait", -1), "version"),
        ((2, "wait", 0, 0), "gradients_per_update"),
    ],
)
def test_barrier_refuses_arguments_out_of_range(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StalenessBarrier(*arguments)  # type: ignore[arg-type]


def test_barrier_refuses_calls_out_of_turn() -> None:
    barrier = barrier_with([0, 0], tau=1)
    barrier.apply(0)
    barrier.ask(0)
    barrier.read(0)

    with pytest.raises(ValueError, match="Worker 9 holds no parameters"):
        barrier.decision(9)
    with pytest.raises(ValueError, match="Worker 9 holds no parameters"):
        barrier.apply(9)
    with pytest.raises(ValueError, match="still holds version 1"):
        barrier.ask(0)
    with pytest.raises(ValueError, match="may not read"):
        barrier.read(0)
    with pytest.raises(ValueError, match="to wait at version 1"):
        barrier.apply(0)
    with pytest.raises(ValueError, match="to apply at version 1"):
        barrier.discard(1)
    with pytest.raises(ValueError, match="version"):
        barrier.version = -1
    assert (barrier.version, barrier.outstanding) == (1, {0: 1, 1: 0})


def test_drop_does_not_apply_what_is_past_the_bound() -> None:
    barrier = barrier_with([0, 0], tau=0, on_stale="drop")
    barrier.apply(0)

    with pytest.raises(ValueError, match="to drop at version 1"):
        barrier.apply(1)
    with pytest.raises(ValueError, match="may not read"):
        barrier.read(1)


# ------------------------------------------------------------------------------------ the simulated cluster


@dataclass
class Cluster:
    """Workers that read, compute for a while and push, until a number of updates has been applied.

    durations[w] are the times of worker w's successive steps, repeated as often as needed; deaths[w] is when
    it dies. Everything that a property talks about is recorded.
    """

    durations: list[list[int]]
    updates: int
    deaths: dict[int, int] = field(default_factory=dict)

    staleness: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    waits: int = 0
    read_waits: int = 0
    most_outstanding: int = 0

    def run(self, barrier: StalenessBarrier) -> None:
        tau = barrier.max_staleness
        events: list[tuple[int, int, int, str]] = []
        steps = dict.fromkeys(range(len(self.durations)), 0)
        idle = set(steps)
        serial = count()
        parked: list[int] = []
        dead: set[int] = set()
        drawn = 0
        now = 0

        def schedule(delay: int, worker: int, what: str) -> None:
            heapq.heappush(events, (now + delay, next(serial), worker, what))

        def draw() -> None:
            nonlocal drawn
            for worker in sorted(idle):
                if drawn == self.updates:
                    break
                idle.remove(worker)
                drawn += 1
                barrier.ask(worker)

        def finish(worker: int, decision: Decision) -> None:
            nonlocal drawn
            if decision is Decision.APPLY:
                self.staleness.append(barrier.apply(worker))
            else:
                self.dropped.append(barrier.discard(worker))
                # Whoever is dropped reads anew and is fresh until the next update.
                assert len(self.dropped) <= len(self.durations) * (len(self.staleness) + 1), "No progress."
                drawn -= 1
            idle.add(worker)

        def settle() -> None:
            progress = True
            while progress:
                draw()
                progress = False
                for worker in barrier.waiting:
                    if barrier.may_read(worker):
                        barrier.read(worker)
                        own = self.durations[worker]
                        schedule(own[steps[worker] % len(own)], worker, "push")
                        steps[worker] += 1
                        progress = True
                for worker in list(parked):
                    if barrier.decision(worker) is not Decision.WAIT:
                        parked.remove(worker)
                        finish(worker, barrier.decision(worker))
                        progress = True
                reads = barrier.outstanding
                self.most_outstanding = max(self.most_outstanding, len(reads))
                if tau is not None and barrier.on_stale == "wait":
                    place = (barrier.gradients_per_update, barrier.filled)
                    assert no_window_is_overfull(list(reads.values()), barrier.version, tau, *place)
            self.read_waits += len(barrier.waiting)
            for worker in parked:
                rest = [read for other, read in reads.items() if other != worker]
                assert tau is not None
                made, filled = divmod(barrier.filled + 1, barrier.gradients_per_update)
                after = (barrier.version + made, tau, barrier.gradients_per_update, filled)
                assert not no_window_is_overfull(rest, *after)
                assert len(rest) > 6 or not in_time_in_some_order(rest, *after)

        for worker, moment in self.deaths.items():
            schedule(moment, worker, "die")
        settle()
        while events:
            now, _, worker, what = heapq.heappop(events)
            if worker in dead:
                continue
            if what == "die":
                dead.add(worker)
                if worker in idle:
                    idle.remove(worker)
                else:
                    drawn -= 1
                if worker in parked:
                    parked.remove(worker)
                barrier.leave(worker)
            else:
                decision = barrier.decision(worker)
                if decision is Decision.WAIT:
                    self.waits += 1
                    parked.append(worker)
                else:
                    finish(worker, decision)
            settle()
        assert not parked, "A push waits although nothing is left to happen."
        assert not barrier.waiting, "A reader waits although nothing is left to happen."
        assert divmod(len(self.staleness), barrier.gradients_per_update) == (barrier.version, barrier.filled)


@st.composite
def clusters(draw: st.DrawFn, max_workers: int = 32, mortal: bool = False) -> Cluster:
    """Workers whose speeds differ up to a hundredfold, with or without jitter."""
    speeds = draw(st.lists(st.integers(1, 100), min_size=1, max_size=max_workers))
    random = draw(st.randoms(use_true_random=False))
    jitter = draw(st.sampled_from([0, 1, 50]))
    durations = [[speed + random.randint(0, jitter) for _ in range(5)] for speed in speeds]
    deaths = {}
    if mortal:
        # The last worker lives, so that somebody is left to do the work.
        deaths = {worker: random.randint(0, 200) for worker in range(len(speeds) - 1) if random.random() < 0.5}
    return Cluster(durations, draw(st.integers(0, 120)), deaths)


bounds = st.integers(0, 64) | st.integers(0, 4)
modes = st.sampled_from(["wait", "drop"])
# Gradients that make a version.
dials = st.just(1) | st.integers(2, 9)
simulated = settings(max_examples=60, deadline=None)


@simulated
@given(cluster=clusters(), tau=st.none() | bounds, on_stale=modes, per_update=dials)
def test_no_applied_update_is_staler_than_the_bound_and_all_planned_ones_are_applied(
    cluster: Cluster, tau: int | None, on_stale: str, per_update: int
) -> None:
    cluster.run(StalenessBarrier(tau, on_stale, 0, per_update))  # type: ignore[arg-type]

    assert len(cluster.staleness) == cluster.updates
    assert tau is None or max(cluster.staleness, default=0) <= tau


@simulated
@given(cluster=clusters(max_workers=8), tau=st.integers(0, 10), per_update=dials)
def test_a_push_waits_only_while_applying_it_would_make_another_one_late(
    cluster: Cluster, tau: int, per_update: int
) -> None:
    cluster.run(
        StalenessBarrier(tau, gradients_per_update=per_update)
    )  # Asserts it for every waiting push after every event.

    assert cluster.dropped == []


@simulated
@given(cluster=clusters(), tau=bounds, per_update=dials)
def test_with_drop_nobody_waits_and_only_what_is_past_the_bound_is_dropped(
    cluster: Cluster, tau: int, per_update: int
) -> None:
    cluster.run(StalenessBarrier(tau, "drop", gradients_per_update=per_update))

    assert (cluster.waits, cluster.read_waits) == (0, 0)
    assert min(cluster.dropped, default=tau + 1) > tau
    assert max(cluster.staleness, default=0) <= tau


@simulated
@given(cluster=clusters(), per_update=dials)
def test_under_a_bound_of_zero_no_more_compute_than_make_a_version(cluster: Cluster, per_update: int) -> None:
    cluster.run(StalenessBarrier(0, gradients_per_update=per_update))

    assert cluster.most_outstanding <= per_update
    assert set(cluster.staleness) <= {0}
    assert cluster.waits == 0


@simulated
@given(cluster=clusters(), slack=st.integers(0, 3), per_update=dials)
def test_a_bound_with_a_place_for_each_worker_lets_all_of_them_compute(
    cluster: Cluster, slack: int, per_update: int
) -> None:
    # A place that the present version has filled already is not free.
    least = -(-(len(cluster.durations) + per_update - 1) // per_update) - 1
    cluster.run(StalenessBarrier(least + slack, gradients_per_update=per_update))

    assert cluster.read_waits == 0


@simulated
@given(cluster=clusters())
def test_a_smaller_bound_keeps_some_of_them_from_computing(cluster: Cluster) -> None:
    workers = len(cluster.durations)
    if workers > 1 and cluster.updates >= workers:
        cluster.run(StalenessBarrier(workers - 2))

        assert cluster.read_waits > 0
        assert cluster.most_outstanding == workers - 1


@simulated
@given(cluster=clusters())
def test_without_a_bound_nobody_waits(cluster: Cluster) -> None:
    cluster.run(StalenessBarrier(None))

    assert (cluster.waits, cluster.read_waits, cluster.dropped) == (0, 0, [])


@simulated
@given(cluster=clusters(mortal=True), tau=st.none() | bounds, on_stale=modes, per_update=dials)
def test_a_worker_that_dies_never_blocks_the_rest(
    cluster: Cluster, tau: int | None, on_stale: str, per_update: int
) -> None:
    cluster.run(StalenessBarrier(tau, on_stale, 0, per_update))  # type: ignore[arg-type]

    assert len(cluster.staleness) == cluster.updates
    assert tau is None or max(cluster.staleness, default=0) <= tau


def test_other_rules_hold_from_a_versions_border_on() -> None:
    barrier = StalenessBarrier(max_staleness=0, gradients_per_update=2)
    for worker in (0, 1):
        barrier.ask(worker)
        barrier.read(worker)
    barrier.apply(0)

    with pytest.raises(ValueError, match="workers \\[1\\] hold parameters"):
        barrier.adjust(3, "wait", 1)
    barrier.leave(1)
    with pytest.raises(ValueError, match="1 gradients wait for more"):
        barrier.adjust(3, "wait", 1)
    barrier.complete()
    barrier.adjust(3, "drop", 1)

    barrier.ask(0)
    barrier.read(0)
    barrier.apply(0)
    assert barrier.version == 2
    assert (barrier.max_staleness, barrier.on_stale, barrier.gradients_per_update) == (3, "drop", 1)
