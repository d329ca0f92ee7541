"""The momentum that the holder steps with in place of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.policies import (
    OrderedMomentum,
    StalenessPolicy,
)
from lightning_async.policies.momentum import check_has_momentum, corrected_momentum
from tests.policy_cluster import (
    LR,
    SHAPES,
    Cluster,
    amsgrad,
    gradient,
    sgd,
)

pytestmark = pytest.mark.timeout(30)


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
