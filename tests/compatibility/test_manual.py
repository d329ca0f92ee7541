"""Optimization by hand: two optimizers that take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async import AMSGrad
from tests.compatibility.runs import RANKS, Reporting, train


class SmallGAN(Reporting):
    """A generator and a discriminator on six features; the generator steps first, as in Lightning's example."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        del self.net
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        self.untouched: list[bool] = []
        self.trainable: list[bool] = []

    def verdict(self, x: Tensor, real: bool) -> Tensor:
        logits = self.discriminator(x)
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def turn(self, loss: Tensor, optimizer: Any, others: nn.Module) -> None:
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        self.untouched.append(all(parameter.grad is None for parameter in others.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        self.batches += 1
        noise = torch.randn(len(batch[0]), 3)
        self.toggle_optimizer(generator)
        self.trainable.append(any(parameter.requires_grad for parameter in self.discriminator.parameters()))
        self.turn(self.verdict(self.generator(noise), real=True), generator, self.discriminator)
        self.toggle_optimizer(discriminator)
        fake = self.verdict(self.generator(noise).detach(), real=False)
        self.turn(self.verdict(batch[0], real=True) + fake, discriminator, self.generator)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [AMSGrad(self.generator.parameters(), lr=1e-3), AMSGrad(self.discriminator.parameters(), lr=4e-3)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 1000) for optimizer in optimizers]

    def facts(self) -> dict[str, Any]:
        schedulers: Any = self.lr_schedulers()
        return {
            "untouched": self.untouched,
            "trainable": self.trainable,
            "scheduled": [scheduler.last_epoch for scheduler in schedulers],
        }


@pytest.mark.compatibility(
    "Optimization",
    "manual optimization with two optimizers (a GAN), `toggle_optimizer`, `clip_gradients`",
    note="Each step refreshes all parameters; k counts the steps of both, as `global_step` does.",
)
@pytest.mark.compatibility(
    "Optimization",
    "schedulers that are stepped by hand",
    "differs",
    "Each rank steps its own, once for each batch that it computes itself. Step them in `on_train_epoch_end`, "
    'or set `param_groups[i]["lr"]` by `trainer.global_step`.',
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_a_gan_is_trained_by_two_optimizers_in_turns(tmp_path: Path, batches: str) -> None:
    run = train(tmp_path, SmallGAN, {"batches": batches})

    ranks, updates = run.reports(), run.report(0)["updates"]
    assert sum(rank["batches"] for rank in ranks) == 24
    assert (ranks[0]["version"], ranks[0]["step"]) == (48, 48 // RANKS)
    for number, rank in enumerate(ranks):
        turns = [update["optimizer"] for update in updates if update["worker"] == number]
        assert turns == [0, 1] * rank["batches"]
        assert rank["untouched"] == [True] * 2 * rank["batches"]
        assert rank["trainable"] == [False] * rank["batches"]
        assert rank["scheduled"] == [rank["batches"]] * 2
    assert [update["lrs"] for update in updates] == [[(1e-3, 4e-3)[update["optimizer"]]] for update in updates]
    for update in updates:
        assert 0 < torch.cat([part.reshape(-1) for part in update["gradients"]]).norm() <= 0.1 * 1.001
    assert sorted(ticket for update in updates for ticket in update["tickets"]) == list(range(24))
    steps = [{state["step"].item() for state in optimizer["state"].values()} for optimizer in ranks[0]["holder"]]
    assert steps == [{24}, {24}]


class RareGenerator(SmallGAN):
    """Steps the generator in every third batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        self.batches += 1
        noise = torch.randn(len(batch[0]), 3)
        if batch_idx % 3 == 0:
            self.turn(self.verdict(self.generator(noise), real=True), generator, nn.Module())
        # The generator's backward leaves gradients in the discriminator, which is not toggled here.
        discriminator.zero_grad()
        fake = self.verdict(self.generator(noise).detach(), real=False)
        self.turn(self.verdict(batch[0], real=True) + fake, discriminator, nn.Module())


@pytest.mark.compatibility("Optimization", "manual optimization where one optimizer steps in some batches only")
def test_an_optimizer_may_sit_batches_out(tmp_path: Path) -> None:
    run = train(tmp_path, RareGenerator)

    ranks, updates = run.reports(), run.report(0)["updates"]
    rare = sum(-(-rank["batches"] // 3) for rank in ranks)
    assert [sum(update["optimizer"] == index for update in updates) for index in (0, 1)] == [rare, 24]
    assert ranks[0]["version"] == rare + 24
    assert sorted(ticket for update in updates for ticket in update["tickets"]) == list(range(24))
