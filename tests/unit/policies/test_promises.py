"""What every policy keeps to, and what a holder makes of one that does not."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from typing_extensions import override

from lightning_async.holder.intake import PolicyError
from lightning_async.holder.placement import DeviceHolder, HolderStream
from lightning_async.policies import (
    POLICIES,
    AgeDamping,
    Arrival,
    DelayAdaptiveStep,
    LookAhead,
    OrderedMomentum,
    RescaledByFrequency,
    StalenessPolicy,
    make_policy,
    momentum_state,
)
from tests import policy_cluster
from tests.policy_cluster import (
    LR,
    ORDER,
    Cluster,
    Make,
    adam,
    amsgrad,
    assert_close,
    sgd,
)

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("make", [sgd, adam, amsgrad])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("k", [1, 2])
def test_with_fresh_gradients_every_policy_is_the_plain_optimizer_bit_for_bit(make: Make, name: str, k: int) -> None:
    order = [0] * 6
    ours = Cluster(make, make_policy(name), workers=1, gradients_per_update=k)
    plain = Cluster(make, StalenessPolicy(), workers=1, gradients_per_update=k)

    assert {*ours.run(order).ages} == {0}
    assert ours.parameters.equal(plain.run(order).parameters)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("k", [1, 4])
def test_a_snapshot_in_mid_run_goes_on_bit_for_bit(name: str, k: int) -> None:
    whole = Cluster(amsgrad, make_policy(name), gradients_per_update=k).run(ORDER[:6])
    snapshot = whole.holder.snapshot()
    rest = Cluster(amsgrad, make_policy(name), gradients_per_update=k)
    values = [[view.clone() for view in rest.layout.views(snapshot.parameters, 0)]]
    rest.holder.load_parameters(values)

    assert (snapshot.gathered is None) == (k == 1)
    rest.holder.restore(snapshot.version, snapshot.optimizer_states, snapshot.gathered, snapshot.policy)
    # In the interrupted run nobody holds what was read before; nor must they in the other.
    for worker in range(3):
        whole.holder.leave(worker)
    whole.reads.clear()

    assert rest.run(ORDER[6:]).parameters.equal(whole.run(ORDER[6:]).parameters)


def test_gathered_gradients_of_different_ages_are_corrected_after_a_resume_that_completes_them() -> None:
    half = Cluster(sgd, OrderedMomentum(), gradients_per_update=4).run(ORDER[:6])
    snapshot = half.holder.snapshot()
    assert snapshot.gathered is not None
    assert snapshot.gathered.late is not None
    half.holder.try_pull(9, half.layout.buffer())
    for worker in (0, 1, 2, 9):
        half.holder.leave(worker)
    half.holder.complete_version()
    resumed = Cluster(sgd, OrderedMomentum(), gradients_per_update=1)
    resumed.holder.load_parameters([resumed.layout.views(snapshot.parameters, 0)])

    resumed.holder.restore(snapshot.version, snapshot.optimizer_states, snapshot.gathered, snapshot.policy)

    torch.testing.assert_close(resumed.parameters, half.parameters)
    assert resumed.holder.version == half.holder.version


class NoStream(HolderStream):
    """Stands for a GPU's."""

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize("policy", [OrderedMomentum, LookAhead])
def test_a_holder_on_a_device_reads_no_step_count_and_takes_what_waits_there_and_back(
    policy: Callable[[], StalenessPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host = Cluster(amsgrad, policy(), gradients_per_update=4).run()
    # A count on a GPU stays a tensor.
    monkeypatch.setattr(momentum_state, "_can_read", lambda steps: False)
    monkeypatch.setattr(
        policy_cluster.__name__ + ".Holder", lambda *own, **more: DeviceHolder(NoStream(), *own, **more)
    )
    half = Cluster(amsgrad, policy(), gradients_per_update=4).run(ORDER[:6])
    snapshot = half.holder.snapshot()
    for worker in range(3):
        half.holder.leave(worker)

    half.holder.restore(snapshot.version, snapshot.optimizer_states, snapshot.gathered, snapshot.policy)

    assert isinstance(half.holder, DeviceHolder)
    assert snapshot.gathered is not None
    again = half.holder.snapshot().gathered
    assert again is not None
    assert again.arrivals == snapshot.gathered.arrivals
    for before, after in ((snapshot.gathered.gradients, again.gradients), (snapshot.gathered.late, again.late)):
        assert [one is not None and one.equal(other) for one, other in zip(before or (), after or (), strict=True)] == (
            [True] * len(before or ())
        )
    on_device = Cluster(amsgrad, policy(), gradients_per_update=4).run()
    assert_close(on_device.parameters, on_host.parameters)
    assert_close(on_device.reads[0][1], on_host.reads[0][1])


def test_the_state_of_another_policy_is_left() -> None:
    snapshot = Cluster(amsgrad, RescaledByFrequency()).run().holder.snapshot()
    assert snapshot.policy["state"] == {"counts": [ORDER.count(worker) for worker in range(3)]}

    class Touchy(AgeDamping):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            raise AssertionError

    Cluster(amsgrad, Touchy()).holder.restore(1, snapshot.optimizer_states, None, snapshot.policy)


def test_a_learning_rate_is_scaled_for_one_step_and_stays_the_users() -> None:
    cluster = Cluster(amsgrad, DelayAdaptiveStep(1)).run()

    (group,) = cluster.holder.snapshot().optimizer_states[0]["param_groups"]
    assert group["lr"] == LR
    assert cluster.holder.take_adapted() == [[{}]]


class HalfOrdered(OrderedMomentum):
    """Two rules in one."""

    @override
    def step_factor(self, arrivals: Sequence[Arrival]) -> float:
        return 0.5


@pytest.mark.parametrize("k", [1, 2])
def test_a_scaled_learning_rate_is_that_of_the_correction_too(k: int) -> None:
    ours = Cluster(sgd, HalfOrdered(), gradients_per_update=k).run()
    theirs = Cluster(lambda own: sgd(own, lr=LR / 2), OrderedMomentum(), gradients_per_update=k).run()

    assert_close(ours.parameters, theirs.parameters)


class Own(StalenessPolicy):
    """A user's: an answer of the test's choice."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @override
    def gradient_factor(self, arrival: Arrival) -> float:
        if isinstance(self.answer, Exception):
            raise self.answer
        factor: float = self.answer
        return factor


@pytest.mark.parametrize("answer", [math.nan, -1.0, math.inf, None])
def test_a_factor_that_means_nothing_is_refused_by_name(answer: Any) -> None:
    with pytest.raises(PolicyError, match=r"gradient_factor of the staleness policy Own\(answer=.*\) returned"):
        Cluster(amsgrad, Own(answer)).run()


def test_an_error_of_a_policy_is_not_taken_for_the_workers() -> None:
    with pytest.raises(PolicyError, match=r"gradient_factor of the staleness policy .* failed: ValueError"):
        Cluster(amsgrad, Own(ValueError("oh"))).run()


def test_a_factor_of_one_hands_the_optimizer_the_workers_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(amsgrad, Own(1.0))
    monkeypatch.setattr(cluster.holder._intake._scaled, "scale", None)

    assert cluster.run().parameters.equal(Cluster(amsgrad, StalenessPolicy()).run().parameters)


@pytest.mark.parametrize(
    ("policy", "optimizer"),
    [
        (OrderedMomentum(), torch.optim.RMSprop),
        (LookAhead(), torch.optim.NAdam),
        (OrderedMomentum(), torch.optim.SGD),
        (LookAhead(), torch.optim.SGD),
        (DelayAdaptiveStep(), torch.optim.Rprop),
    ],
)
def test_optimizers_that_a_policy_cannot_work_with_are_refused_by_name(policy: Any, optimizer: Any) -> None:
    with pytest.raises(ValueError, match=rf"{type(policy).__name__} .*{optimizer.__name__}.* [tT]ake "):
        policy.check(optimizer([torch.nn.Parameter(torch.ones(1))], lr=0.1))


def test_dampening_is_refused_for_ordered_momentum() -> None:
    with pytest.raises(ValueError, match="without dampening"):
        OrderedMomentum().check(sgd([torch.nn.Parameter(torch.ones(1))], dampening=0.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AgeDamping(-1),
        lambda: AgeDamping(math.nan),
        lambda: DelayAdaptiveStep(0),
        lambda: RescaledByFrequency(0.5),
        lambda: LookAhead(-1),
    ],
)
def test_arguments_without_a_meaning_are_refused(make: Callable[[], StalenessPolicy]) -> None:
    with pytest.raises(ValueError, match="must be a number of at least"):
        make()


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_says_how_it_was_made_and_can_be_copied(name: str) -> None:
    policy = make_policy(name)
    namespace: Mapping[str, Any] = {type(policy).__name__: type(policy)}

    assert repr(eval(repr(policy), dict(namespace))) == repr(copy.deepcopy(policy))
