"""Each policy against its paper's formula, computed apart from it; and what a holder makes of one."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.intake import PolicyError
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.placement import DeviceHolder, HolderStream
from lightning_async.holder.types import Push
from lightning_async.policies import (
    POLICIES,
    AgeDamping,
    Arrival,
    DelayAdaptiveStep,
    FromDDP,
    LookAhead,
    OrderedMomentum,
    RescaledByFrequency,
    StalenessPolicy,
    make_policy,
    momentum_state,
)
from lightning_async.policies.momentum import check_has_momentum, corrected_momentum, momentum_rule
from lightning_async.runtime.failure import FailureLatch

pytestmark = pytest.mark.timeout(30)

SHAPES = ((3, 2), (5,))
NUMEL = 11
LR = 0.05
# Who pushes when. Ages of 0 to 5 come of it, and rank 2 is slow.
ORDER = (0, 1, 0, 1, 0, 2, 1, 0, 0, 1, 1, 0, 2, 0, 1, 0)

Make = Callable[[Any], Optimizer]


def sgd(parameters: Any, **more: Any) -> Optimizer:
    return torch.optim.SGD(parameters, **({"lr": LR, "momentum": 0.8} | more))


def adam(parameters: Any, **more: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=LR, betas=(0.8, 0.95), **more)


def amsgrad(parameters: Any, **more: Any) -> Optimizer:
    return AMSGrad(parameters, lr=LR, betas=(0.8, 0.95), **more)


class Cluster:
    """A holder, and workers that push in the order that a test says, each at what it has read last."""

    def __init__(
        self,
        make: Make,
        policy: StalenessPolicy,
        workers: int = 3,
        gradients_per_update: int = 1,
        correction: Any = None,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.optimizer = make(parameters)
        self.layout = FlatLayout([parameters])
        self.initial = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.policy = policy
        policy.bind(workers, gradients_per_update)
        self.holder = Holder(
            self.layout,
            self.initial,
            [self.optimizer],
            StalenessBarrier(None, gradients_per_update=gradients_per_update),
            FailureLatch(),
            policy=policy,
            momentum_rule=momentum_rule(correction, workers, gradients_per_update),
        )
        self.hyperparams = HyperparamLayout(self.optimizer)
        (group,) = self.optimizer.param_groups[:1]
        self.steps_change_gradients = bool(group.get("nesterov") and group.get("foreach"))
        self.ages: list[int] = []
        self.reads: dict[int, tuple[int, Tensor]] = {}

    def read(self, worker: int) -> Tensor:
        out = self.layout.buffer()
        version = self.holder.try_pull(worker, out)
        assert version is not None
        self.reads[worker] = version, out
        return out

    def push(self, worker: int, gradient: Tensor, samples: int = 4, missing: Sequence[int] = ()) -> None:
        """Pushes a gradient of the parameters that the worker has read, and reads again."""
        flat = gradient.clone()
        views: list[Tensor | None] = [
            None if index in missing else view for index, view in enumerate(self.layout.views(flat, 0))
        ]
        groups = self.hyperparams.read(self.optimizer.param_groups)
        version, _ = self.reads.pop(worker)
        update = self.holder.try_push(Push(worker, 0, version, views, groups, samples=samples, flat=flat))
        assert update is not None
        # It is the worker's memory.
        assert flat.equal(gradient) or self.steps_change_gradients
        self.ages.append(update.staleness)
        self.read(worker)

    def run(self, order: Sequence[int] = ORDER, samples: Sequence[int] = (4,)) -> Cluster:
        for worker in {*order} - self.reads.keys():
            self.read(worker)
        for index, worker in enumerate(order):
            self.push(worker, gradient(index), samples[index % len(samples)])
        return self

    @property
    def parameters(self) -> Tensor:
        out = self.layout.buffer()
        self.holder.read(out)
        return out


def gradient(index: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(index))


def arrivals(cluster: Cluster, order: Sequence[int] = ORDER) -> list[tuple[int, int, Tensor]]:
    """Of each update its worker, its age and its gradient in double precision, where each gradient is one."""
    return [(worker, cluster.ages[at], gradient(at).double()) for at, worker in enumerate(order)]


def serial_amsgrad(
    cluster: Cluster,
    factor: Callable[[int], float] = lambda age: 1.0,
    rate: Callable[[int], float] = lambda age: 1.0,
    late: Callable[[int], float] = lambda age: 0.0,
) -> Tensor:
    """The paper's recursion with bias correction, in double precision; ``late`` is the part that has come too late."""
    x, m, v = cluster.initial.double(), torch.zeros(NUMEL).double(), torch.zeros(NUMEL).double()
    v_max = v.clone()
    for step, (_, age, g) in enumerate(arrivals(cluster), 1):
        taken = factor(age) * g
        m = 0.8 * m + 0.2 * taken
        v = 0.95 * v + 0.05 * taken**2
        v_max = torch.maximum(v_max, v)
        size, denominator = LR * rate(age) / (1 - 0.8**step), (v_max / (1 - 0.95**step)).sqrt() + 1e-8
        x = x - size * (m + 0.8 * late(age) * taken) / denominator
        m = m - 0.2 * late(age) * taken
    return x


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-5, atol=2e-6)


def test_the_order_of_the_tests_has_gradients_of_many_ages() -> None:
    assert {*Cluster(amsgrad, StalenessPolicy()).run().ages} >= {0, 1, 2, 3, 5, 6}


# --- the formulas ----------------------------------------------------------------------------------------------------


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


# --- what is promised of all -----------------------------------------------------------------------------------------


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
    monkeypatch.setattr(f"{__name__}.Holder", lambda *own, **more: DeviceHolder(NoStream(), *own, **more))
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


# --- the momentum of the holder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "momentum_of"),
    [
        (lambda own, b: torch.optim.SGD(own, lr=LR, momentum=b), "momentum"),
        (lambda own, b: torch.optim.RMSprop(own, lr=LR, momentum=b), "momentum"),
        (lambda own, b: AMSGrad(own, lr=LR, betas=(b, 0.95)), "betas"),
        (lambda own, b: torch.optim.NAdam(own, lr=LR, betas=(b, 0.95)), "betas"),
    ],
    ids=["sgd", "rmsprop", "amsgrad", "nadam"],
)
@pytest.mark.parametrize(("correction", "factor"), [(0.5, 0.5), (0, 0.0), ("auto", None), (1, 1.0)])
def test_the_holder_steps_with_the_corrected_momentum_and_shows_the_users(
    make: Callable[[Any, float], Optimizer], momentum_of: str, correction: Any, factor: float | None
) -> None:
    corrected = corrected_momentum(0.9, 3, 1) if factor is None else factor * 0.9
    ours = Cluster(lambda own: make(own, 0.9), StalenessPolicy(), correction=correction).run()
    theirs = Cluster(lambda own: make(own, corrected), StalenessPolicy()).run()

    torch.testing.assert_close(ours.parameters, theirs.parameters)
    snapshot = ours.holder.snapshot()
    shown = snapshot.optimizer_states[0]["param_groups"][0][momentum_of]
    assert shown == ((0.9, 0.95) if momentum_of == "betas" else 0.9)
    assert snapshot.adapted == [[{}]]


def test_no_correction_changes_no_bit() -> None:
    plain = Cluster(amsgrad, StalenessPolicy()).run()

    assert Cluster(amsgrad, StalenessPolicy(), correction=1.0).run().parameters.equal(plain.parameters)


def test_a_momentum_that_is_corrected_to_none_leaves_a_state_that_loads_anywhere() -> None:
    cluster = Cluster(lambda own: torch.optim.RMSprop(own, lr=LR, momentum=0.5), StalenessPolicy(), correction=0).run()
    elsewhere = torch.optim.RMSprop([torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES], lr=LR, momentum=0.5)

    elsewhere.load_state_dict(cluster.holder.snapshot().optimizer_states[0])

    for parameter in elsewhere.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    elsewhere.step()


def test_cycled_momentum_passes_through_the_correction() -> None:
    cluster = Cluster(amsgrad, StalenessPolicy(), correction=0.5)
    seen: list[float] = []
    held = cluster.holder._optimizers[0]
    update = held._update

    def watch(gradients: Sequence[Tensor | None]) -> None:
        seen.append(held.optimizer.param_groups[0]["betas"][0])
        update(gradients)

    held._update = watch  # type: ignore[assignment]
    for worker in range(3):
        cluster.read(worker)
    for at, beta in enumerate((0.95, 0.85, 0.9)):
        cluster.optimizer.param_groups[0]["betas"] = (beta, 0.95)
        cluster.push(at, gradient(at))

    assert seen == [0.5 * beta for beta in (0.95, 0.85, 0.9)]


def test_ordered_momentum_orders_the_momentum_that_is_in_force() -> None:
    for k in (1, 2):
        ours = Cluster(lambda own: sgd(own, momentum=0.9), OrderedMomentum(), gradients_per_update=k, correction=0.5)
        theirs = Cluster(lambda own: sgd(own, momentum=0.45), OrderedMomentum(), gradients_per_update=k)

        assert ours.run().parameters.equal(theirs.run().parameters)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [(torch.optim.Adagrad, "Adagrad has neither"), (torch.optim.SGD, "SGD has momentum 0")],
)
def test_an_optimizer_without_momentum_has_none_to_correct(optimizer: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"{says}. Leave it out"):
        check_has_momentum(optimizer([torch.nn.Parameter(torch.ones(1))], lr=0.1))


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "Auto", math.nan])
def test_a_correction_without_a_meaning_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match='momentum_correction must be "auto", a number between 0 and 1'):
        ExchangeOptions(momentum_correction=value)


def test_a_name_that_is_none_is_answered_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"one of 'plain', 'damping', .*'from_ddp' or an instance .*, not 'dampen'"):
        ExchangeOptions(staleness_policy="dampen")
