"""Large models: several threads, and several pushes in one pass, with the bits of one push after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_async.holder import blocks
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import HalfUpdatedError, Push, Update, WaitingPush
from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.damping import AgeDamping
from lightning_async.policies.look_ahead import LookAhead
from lightning_async.runtime.failure import FailureLatch

pytestmark = pytest.mark.timeout(60)

# Tensors that end in the middle of a vector, empty ones and scalars among them.
SHAPES = ((130,), (3, 67), (), (0,), (257,), (64,), (15,))
GROUPS: Sequence[dict[str, Any]] = ({"lr": 0.01}, {"lr": 0.1, "betas": (0.5, 0.8), "weight_decay": 0.1})

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "AMSGrad": lambda groups: AMSGrad(groups, lr=0.05),
    "AMSGrad without bias correction": lambda groups: AMSGrad(groups, lr=0.05, bias_correction=False),
    "AMSGrad, decoupled": lambda groups: AMSGrad(groups, lr=0.05, decoupled_weight_decay=True, weight_decay=0.1),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.05),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.05, maximize=True),
}


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a few hundred parameters counts as large, and is cut as often as can be."""
    monkeypatch.setattr(blocks, "LARGE", 1)
    monkeypatch.setattr(blocks, "BLOCK", 64)


class Run:
    """A holder, and workers whose gradients are made of seeds."""

    def __init__(
        self,
        make: Make = OPTIMIZERS["AMSGrad"],
        workers: int = 3,
        threads: int = 1,
        barrier: StalenessBarrier | None = None,
        sizes: Sequence[tuple[int, ...]] = SHAPES,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in sizes]
        half = len(parameters) // 2
        halves = (parameters[:half], parameters[half:])
        groups = [{"params": part, **more} for part, more in zip(halves, GROUPS, strict=True)]
        self.optimizer = make([group for group in groups if group["params"]])
        self.layout = FlatLayout([[parameter for group in groups for parameter in group["params"]]])
        initial = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.updates: list[Update] = []
        self.barrier = barrier or StalenessBarrier(None)
        self.holder = Holder(
            self.layout, initial, [self.optimizer], self.barrier, FailureLatch(), self.updates.append,
            threads=threads, **options,
        )  # fmt: skip
        self.hyperparams = HyperparamLayout(self.optimizer)
        self.outs = [self.layout.buffer() for _ in range(workers)]
        self.versions: list[int | None] = [None] * workers
        for worker in range(workers):
            self.pull(worker)

    def pull(self, worker: int) -> None:
        self.versions[worker] = self.holder.try_pull(worker, self.outs[worker])

    def waiting(self, worker: int, seed: int, **changes: Any) -> WaitingPush:
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.randn(self.layout.numel, generator=generator)
        # A schedule: each push has a learning rate of its own.
        groups = [value * (1 + seed % 3) for value in self.hyperparams.read(self.optimizer.param_groups)[:1]]
        groups = [*groups, *self.hyperparams.read(self.optimizer.param_groups)[1:]]
        version = self.versions[worker]
        assert version is not None
        push = Push(worker, 0, version, self.layout.views(gradient, 0), tuple(groups), samples=seed, flat=gradient)
        return WaitingPush(push._replace(**changes), self.outs[worker], lambda: True)

    def one_by_one(self, waiting: Sequence[WaitingPush]) -> None:
        for push, _, reads_next in waiting:
            if self.holder.try_push(push, reads_next=reads_next) is not None and reads_next():
                self.pull(push.worker)

    def at_once(self, waiting: Sequence[WaitingPush]) -> int:
        """Pushes together, and what is left one by one; returns how many went together."""
        done = self.holder.push_together(waiting)
        for (push, *_), (_, version) in zip(waiting, done, strict=False):
            self.versions[push.worker] = version
        self.one_by_one(waiting[len(done) :])
        return len(done)

    def shown(self) -> dict[str, Any]:
        """All that the run has come to, ready to be compared."""
        snapshot = self.holder.snapshot()
        state = snapshot.optimizer_states[0]
        return {
            "parameters": snapshot.parameters.tolist(),
            "state": {place: {k: v.tolist() for k, v in one.items()} for place, one in state["state"].items()},
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
            # What lies where a worker has no answer yet means nothing.
            "answers": {worker: self.outs[worker].tolist() for worker, _ in self.barrier.outstanding},
            "versions": self.versions,
            "outstanding": dict(self.barrier.outstanding),
            "queue": self.barrier.waiting,
            "updates": [(u.push.worker, u.version, u.staleness, u.applied, u.rejected) for u in self.updates],
            "counts": self.holder.counts,
        }

    def close(self) -> None:
        self.holder.close()


def rounds(run: Run, seeds: Sequence[Sequence[int]], serve: Callable[[Sequence[WaitingPush]], object]) -> None:
    # Optimizers have no state before their first step, which is made alone.
    run.one_by_one([run.waiting(worker, seed=90 + worker) for worker in range(len(run.versions))])
    for of_round in seeds:
        serve([run.waiting(worker, seed) for worker, seed in enumerate(of_round)])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_pass_gives_every_bit_answer_and_record_of_one_push_after_the_other(name: str, threads: int) -> None:
    seeds = [[1, 2, 3], [4, 5], [6, 7, 8]]
    one, other = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name], threads=threads)
    together: list[int] = []

    rounds(one, seeds, one.one_by_one)
    rounds(other, seeds, lambda waiting: together.append(other.at_once(waiting)))

    assert together == [3, 2, 3]
    assert other.shown() == one.shown()
    other.close()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6).filter(any),
    threads=st.integers(1, 3),
    seeds=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_whatever_the_sizes_threads_and_one_pass_leave_the_bits_alone(
    sizes: list[int], threads: int, seeds: list[list[int]]
) -> None:
    shapes = [(size,) for size in sizes]
    one, other, shared = (Run(workers=4, sizes=shapes, threads=number) for number in (1, threads, threads))

    rounds(one, seeds, one.one_by_one)
    rounds(other, seeds, other.at_once)
    rounds(shared, seeds, shared.one_by_one)

    assert other.shown() == shared.shown() == one.shown()
    for run in (other, shared):
        run.close()


def test_momentum_correction_is_in_force_in_one_pass() -> None:
    one, other = (Run(momentum_rule=lambda beta: 0.5 * beta) for _ in range(2))
    plain = Run()

    for run, serve in ((one, one.one_by_one), (other, other.at_once), (plain, plain.one_by_one)):
        rounds(run, [[1, 2, 3]], serve)

    assert other.shown() == one.shown()
    assert plain.shown()["parameters"] != one.shown()["parameters"]


@pytest.mark.parametrize("place", range(3))
def test_a_push_that_is_rejected_is_not_applied_in_part_and_the_others_are_as_ever(place: int) -> None:
    one, other = Run(workers=4), Run(workers=4)

    def waiting(run: Run) -> list[WaitingPush]:
        return [run.waiting(worker, 7 + worker, finite=worker != place) for worker in range(4)]

    for run in (one, other):
        rounds(run, [], run.one_by_one)
    one.one_by_one(waiting(one))
    together = other.at_once(waiting(other))

    # What comes before it, if that is more than one.
    assert together == (place if place > 1 else 0)
    assert other.shown() == one.shown()
    assert [update.rejected for update in other.updates[4:]] == [worker == place for worker in range(4)]


@pytest.mark.parametrize(
    "changes",
    [{"flat": None}, {"gradients": [None] * len(SHAPES)}, {"version_read": 0}],
    ids=["not in a row", "without some gradients", "another version than it holds"],
)
def test_what_does_not_fit_into_a_pass_is_left_for_its_own_way(changes: dict[str, Any]) -> None:
    run = Run()
    rounds(run, [], run.one_by_one)

    done = run.holder.push_together([run.waiting(0, 1), run.waiting(1, 2), run.waiting(2, 3, **changes)])

    assert [update.version for update, _ in done] == [4, 5]
    assert run.holder.version == 5


@pytest.mark.parametrize("bound", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("on_stale", ["wait", "drop"])
def test_the_bound_holds_in_one_pass_as_one_by_one(bound: int, on_stale: Any) -> None:
    runs = [Run(workers=4, barrier=StalenessBarrier(bound, on_stale)) for _ in range(2)]
    for run, serve in zip(runs, (runs[0].one_by_one, runs[1].at_once), strict=True):
        for number in range(4):
            readers = [worker for worker in range(4) if run.barrier.held((worker, 0)) is not None]
            serve([run.waiting(worker, 10 * number + worker) for worker in readers])
            for worker in range(4):
                if run.barrier.held((worker, 0)) is None:
                    run.pull(worker)

    assert runs[1].shown() == runs[0].shown()
    assert max(update.staleness for update in runs[1].updates if update.applied) <= bound


def test_a_worker_without_further_tickets_is_out_of_the_barrier() -> None:
    run = Run(barrier=StalenessBarrier(4))
    rounds(run, [], run.one_by_one)
    waiting = [run.waiting(worker, worker) for worker in range(3)]

    done = run.holder.push_together([waiting[0], waiting[1]._replace(reads_next=lambda: False), waiting[2]])

    assert [version for _, version in done] == [4, None, 6]
    assert dict(run.barrier.outstanding) == {(0, 0): 4, (2, 0): 6}


@pytest.mark.parametrize(
    ("options", "barrier"),
    [
        ({"policy": AgeDamping()}, None),
        ({"policy": LookAhead()}, None),
        ({}, StalenessBarrier(None, gradients_per_update=2)),
    ],
    ids=["a policy that asks", "a policy that moves answers", "several gradients in an update"],
)
def test_what_scales_moves_or_averages_gradients_takes_the_ordinary_way(
    options: dict[str, Any], barrier: StalenessBarrier | None
) -> None:
    policy: StalenessPolicy | None = options.get("policy")
    if policy is not None:
        policy.bind(workers=3, gradients_per_update=1)
    run = Run(barrier=barrier, **options)

    assert not run.holder.joins_pushes
    assert run.at_once([run.waiting(0, 1), run.waiting(1, 2)]) == 0


def test_small_models_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGE", 10_000)

    assert not Run(threads=2).holder.joins_pushes


@pytest.mark.parametrize("threads", [1, 2])
def test_an_update_that_fails_in_the_middle_is_not_shown(threads: int) -> None:
    run = Run(threads=threads)
    rounds(run, [], run.one_by_one)
    too_short: Tensor = torch.zeros(3)

    with pytest.raises(RuntimeError):
        run.holder.push_together([run.waiting(0, 1), run.waiting(1, 2, flat=too_short)])

    with pytest.raises(HalfUpdatedError):
        run.holder.snapshot()
    run.close()


@pytest.mark.parametrize("threads", [2, 3])
def test_the_mean_of_several_gradients_is_the_same_with_any_number_of_threads(threads: int) -> None:
    runs = [Run(threads=number, barrier=StalenessBarrier(None, gradients_per_update=3)) for number in (1, threads)]

    for run in runs:
        rounds(run, [[1, 2, 3], [4, 5, 6]], run.one_by_one)

    assert runs[1].shown() == runs[0].shown()
    runs[1].close()


def test_a_policys_scaled_gradients_are_the_same_with_any_number_of_threads() -> None:
    runs = []
    for threads in (1, 3):
        policy = AgeDamping()
        policy.bind(workers=3, gradients_per_update=1)
        runs.append(Run(threads=threads, policy=policy))
        rounds(runs[-1], [[1, 2, 3], [4, 5, 6]], runs[-1].one_by_one)

    assert runs[1].shown() == runs[0].shown()
    runs[1].close()


def test_a_saved_state_goes_on_with_the_same_bits_by_any_way() -> None:
    one, other = Run(), Run(threads=2)
    for run, serve in ((one, one.one_by_one), (other, other.at_once)):
        rounds(run, [[1, 2, 3]], serve)
        saved = run.holder.snapshot()
        for worker in range(3):
            run.holder.leave(worker)
        run.holder.restore(saved.version, saved.optimizer_states)
        for worker in range(3):
            run.pull(worker)
        # Loaded, it has to be looked at anew.
        rounds(run, [[4, 5, 6]], serve)

    assert other.shown() == one.shown()
    other.close()


def test_an_optimizer_that_cannot_be_cut_is_stepped_as_ever_and_copied_by_all_threads() -> None:
    make = functools.partial(torch.optim.RMSprop, lr=0.01)
    one, other = Run(make), Run(make, threads=3)

    for run, serve in ((one, one.one_by_one), (other, other.at_once)):
        rounds(run, [[1, 2, 3]], serve)

    assert other.shown() == one.shown()
    other.close()
