"""Each policy against its paper's formula, computed apart from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.policies import (
    AgeDamping,
    Arrival,
    DelayAdaptiveStep,
    FromDDP,
    LookAhead,
    OrderedMomentum,
    RescaledByFrequency,
    StalenessPolicy,
)
from tests.policy_cluster import (
    LR,
    NUMEL,
    ORDER,
    Cluster,
    Make,
    amsgrad,
    arrivals,
    assert_close,
    gradient,
    serial_amsgrad,
    sgd,
)

pytestmark = pytest.mark.timeout(30)


def test_the_order_of_the_tests_has_gradients_of_many_ages() -> None:
    assert {*Cluster(amsgrad, StalenessPolicy()).run().ages} >= {0, 1, 2, 3, 5, 6}


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_damping_is_amsgrad_with_gradients_times_the_exponential_of_their_age(rate: float) -> None:
    cluster = Cluster(amsgrad, AgeDamping(rate)).run()

    assert_close(cluster.parameters, serial_amsgrad(cluster, factor=lambda age: math.exp(-rate * age)))


@pytest.mark.parametrize(("threshold", "expected"), [(None, 2.0), (1, 1.0), (3.5, 3.5)])
def test_delay_adaptive_steps_are_fadas(threshold: float | None, expected: float) -> None:
    cluster = Cluster(amsgrad, DelayAdaptiveStep(threshold)).run()

    # The paper's two cases; with three ranks the average age is two.
    wanted = serial_amsgrad(cluster, rate=lambda age: 1.0 if age <= expected else min(1.0, expected / age))
    assert_close(cluster.parameters, wanted)


@pytest.mark.parametrize(("workers", "k", "threshold"), [(4, 1, 3), (8, 4, 2), (4, 4, 1), (1, 1, 1)])
def test_the_threshold_is_the_average_age_of_equal_ranks(workers: int, k: int, threshold: int) -> None:
    policy = DelayAdaptiveStep()
    policy.bind(workers, k)

    assert policy.step_factor([Arrival(0, threshold, 99, 4)]) == 1.0
    assert policy.step_factor([Arrival(0, 0, 99, 4), Arrival(0, 2 * threshold, 99, 4)]) == 0.5


def test_rescaled_sgd_gives_each_rank_a_step_in_proportion_to_the_inverse_of_its_share() -> None:
    cluster = Cluster(lambda own: sgd(own, momentum=0), RescaledByFrequency()).run()

    x = cluster.initial.double()
    for at, (worker, _, g) in enumerate(arrivals(cluster), 1):
        share = ORDER[:at].count(worker) / at
        x = x - LR * min(4.0, max(0.25, 1 / 3 / share)) * g
    assert_close(cluster.parameters, x)


def test_rescaled_weights_add_up_to_the_same_for_ranks_of_different_speed() -> None:
    policy = RescaledByFrequency()
    policy.bind(2, 1)
    rounds = [0, 0, 0, 1] * 200
    totals = [0.0, 0.0]
    for at, worker in enumerate(rounds):
        factor = policy.gradient_factor(Arrival(worker, 0, at, 4))
        totals[worker] += factor

    assert totals[0] / totals[1] == pytest.approx(1.0, abs=0.02)


def ordered_sgd(cluster: Cluster, weights: Sequence[float], k: int, nesterov: bool, order: Sequence[int]) -> Tensor:
    """Where SGD would be if each gradient had come when it was computed, in closed form.

    A gradient that was read at version r has by version t been in t - r steps, with powers of the momentum.
    """
    b, versions = 0.8, -(-len(order) // k)
    x = cluster.initial.double()
    for at, age in enumerate(cluster.ages):
        steps = versions - (at // k - age)
        moved = (1 - b ** (steps + nesterov)) / (1 - b)
        x = x - LR * moved * weights[at] * gradient(at).double()
    return x


@pytest.mark.parametrize(
    "more",
    [
        {"fused": True},
        {"foreach": True},
        {"foreach": False},
        {"nesterov": True, "fused": True},
        # Torch's own step changes the gradients that it is given.
        {"nesterov": True, "foreach": True},
    ],
    ids=["fused", "foreach", "single", "nesterov", "nesterov-foreach"],
)
def test_ordered_momentum_is_sgd_with_gradients_that_come_when_they_are_computed(more: dict[str, Any]) -> None:
    cluster = Cluster(lambda own: sgd(own, **more), OrderedMomentum()).run()

    wanted = ordered_sgd(cluster, [1.0] * len(ORDER), 1, more.get("nesterov", False), ORDER)
    assert_close(cluster.parameters, wanted)


def test_ordered_momentum_maximizes_where_the_optimizer_does() -> None:
    cluster = Cluster(lambda own: sgd(own, maximize=True), OrderedMomentum()).run()

    mirrored = ordered_sgd(cluster, [-1.0] * len(ORDER), 1, False, ORDER)
    assert_close(cluster.parameters, mirrored)


def test_ordered_momentum_of_a_mean_is_the_mean_of_ordered_momenta() -> None:
    samples = (4, 2, 3)
    order = ORDER[:-1]
    cluster = Cluster(sgd, OrderedMomentum(), gradients_per_update=3).run(order, samples)

    assert len({*cluster.ages}) > 2
    assert_close(cluster.parameters, ordered_sgd(cluster, [n / 9 for n in samples] * 5, 3, False, order))


@pytest.mark.parametrize(
    "make",
    [
        amsgrad,
        lambda own: amsgrad(own, fused=False),
        lambda own: torch.optim.Adam(own, lr=LR, betas=(0.8, 0.95), amsgrad=True, foreach=True),
    ],
    ids=["amsgrad", "unfused", "foreach"],
)
def test_ordered_momentum_for_amsgrad_is_its_recursion(make: Make) -> None:
    cluster = Cluster(make, OrderedMomentum()).run()

    assert_close(cluster.parameters, serial_amsgrad(cluster, late=lambda age: 1 - 0.8**age))


def test_ordered_momentum_leaves_decoupled_weight_decay_alone_and_corrects_without_coupled() -> None:
    # With learning rate 0 nothing but the momentum moves.
    def still(own: Any) -> Optimizer:
        return torch.optim.SGD(own, lr=0.0, momentum=0.8, weight_decay=0.1)

    cluster = Cluster(still, OrderedMomentum()).run()
    buffer = torch.zeros(NUMEL).double()
    for _, age, g in arrivals(cluster):
        buffer = 0.8 * buffer + 0.8**age * g + 0.1 * cluster.initial.double()
    state = cluster.holder.optimizer_state(0)
    assert_close(torch.cat([state[place]["momentum_buffer"].flatten() for place in range(2)]), buffer)


def test_each_param_group_has_its_own_ordered_momentum() -> None:
    def make(own: Any, first: float = 0.8, second: float = 0.3) -> Optimizer:
        groups = [{"params": own[:1], "momentum": first}, {"params": own[1:], "momentum": second}]
        return torch.optim.SGD(groups, lr=LR)

    for k in (1, 2):
        both = Cluster(make, OrderedMomentum(), gradients_per_update=k).run().parameters
        first = Cluster(lambda own: make(own, 0.8, 0.8), OrderedMomentum(), gradients_per_update=k).run().parameters
        second = Cluster(lambda own: make(own, 0.3, 0.3), OrderedMomentum(), gradients_per_update=k).run().parameters
        torch.testing.assert_close(both[:6], first[:6])
        torch.testing.assert_close(both[6:], second[6:])


@pytest.mark.parametrize("policy", [OrderedMomentum, LookAhead, AgeDamping, DelayAdaptiveStep, RescaledByFrequency])
@pytest.mark.parametrize("k", [1, 2])
def test_parameters_without_a_gradient_are_left_alone(policy: Callable[[], StalenessPolicy], k: int) -> None:
    cluster = Cluster(amsgrad, policy(), gradients_per_update=k)
    for worker in range(3):
        cluster.read(worker)
    for at in range(8):
        cluster.push(at % 3, gradient(at), missing=(1,))

    assert cluster.parameters[6:].equal(cluster.initial[6:])
    assert not cluster.parameters[:6].equal(cluster.initial[:6])


@pytest.mark.parametrize(("delay", "expected"), [(None, 2.0), (5, 5.0)])
def test_look_ahead_answers_with_the_parameters_along_amsgrads_next_steps(delay: Any, expected: float) -> None:
    cluster = Cluster(amsgrad, LookAhead(delay)).run()

    state = cluster.holder.optimizer_state(0)
    # Without a new gradient AMSGrad would go on by this, but for the decay of m.
    m = torch.cat([state[place]["exp_avg"].flatten() for place in range(2)]).double()
    v = torch.cat([state[place]["max_exp_avg_sq"].flatten() for place in range(2)]).double()
    steps = len(ORDER)
    moved = LR * expected * (m / (1 - 0.8**steps)) / ((v / (1 - 0.95**steps)).sqrt() + 1e-8)
    _, answered = cluster.reads[0]
    assert_close(answered, cluster.parameters.double() - moved)
    assert cluster.holder.snapshot().parameters.equal(cluster.parameters)


def test_look_ahead_answers_with_the_parameters_along_the_momentum_of_sgd() -> None:
    cluster = Cluster(sgd, LookAhead(), gradients_per_update=2).run()

    state = cluster.holder.optimizer_state(0)
    buffer = torch.cat([state[place]["momentum_buffer"].flatten() for place in range(2)])
    assert_close(cluster.reads[0][1], cluster.parameters - LR * 1.0 * buffer)


@pytest.mark.parametrize(("make", "factor"), [(amsgrad, 0.5**0.5), (sgd, 0.5)])
def test_the_settings_of_ddp_are_a_shorter_step_and_a_look_ahead_as_much_shorter(make: Any, factor: float) -> None:
    ours = Cluster(make, FromDDP(), workers=4, gradients_per_update=2)
    ours.policy.check(ours.optimizer)
    theirs = Cluster(make, LookAhead(), workers=4, gradients_per_update=2)
    theirs.optimizer.param_groups[0]["lr"] *= factor

    for cluster in (ours, theirs):
        cluster.run([0, 1, 2, 3, 0, 1, 2, 3])

    assert torch.allclose(ours.parameters, theirs.parameters, rtol=1e-6)
    assert torch.allclose(ours.reads[1][1], theirs.reads[1][1], rtol=1e-6)
    assert not torch.allclose(ours.reads[3][1], ours.parameters)


def test_look_ahead_moves_nothing_before_the_first_step_nor_for_one_rank() -> None:
    assert Cluster(amsgrad, LookAhead()).read(0).equal(Cluster(amsgrad, StalenessPolicy()).initial)
    alone = Cluster(amsgrad, LookAhead(7), workers=1).run([0, 0, 0])
    assert alone.reads[0][1].equal(alone.parameters)
