"""A holder with a staleness policy, and workers that push in the order that a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_async.holder.amsgrad import AMSGrad
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import Push
from lightning_async.policies import StalenessPolicy
from lightning_async.policies.momentum import momentum_rule
from lightning_async.runtime.failure import FailureLatch

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
