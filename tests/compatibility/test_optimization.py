"""Optimization: what is pushed and what the holder makes of it is what DDP's optimizer would have been given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_async import AMSGrad
from tests.compatibility.runs import RANKS, Reporting, train
from tests.launch import launch
from tests.models import fork_trainer, loader


@pytest.mark.compatibility("Optimization", "gradient clipping by value")
def test_gradients_are_clipped_by_value(tmp_path: Path) -> None:
    run = train(tmp_path, Reporting, gradient_clip_val=1e-3, gradient_clip_algorithm="value")

    updates = run.report(0)["updates"]
    assert len(updates) == 24
    for update in updates:
        largest = max(gradient.abs().max().item() for gradient in update["gradients"])
        assert largest == pytest.approx(1e-3, rel=1e-6)


def step_lr(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5), "interval": "step"}


def every_third_step(optimizer: Any) -> dict[str, Any]:
    return {**step_lr(optimizer), "frequency": 3}


def each_epoch(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.ExponentialLR(optimizer, gamma=0.1), "interval": "epoch"}


def one_cycle(optimizer: Any, steps: int = 32) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps), "interval": "step"}


def warm_up_then_cosine(optimizer: Any) -> dict[str, Any]:
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=6)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=26)
    return {"scheduler": lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[6]), "interval": "step"}


class Scheduled(Reporting):
    """Notes the learning rate of each of its steps; `OneCycleLR` is as long as the trainer says."""

    def __init__(self, make: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.make = make
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = AMSGrad(self.parameters(), lr=0.01)
        arguments = [int(self.trainer.estimated_stepping_batches)] if self.make is one_cycle else []
        return {"optimizer": optimizer, "lr_scheduler": self.make(optimizer, *arguments)}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def rates_of_lightning(
    folder: Path, make_module: Callable[[], Scheduled], samples: int, **arguments: Any
) -> list[float]:
    """The learning rate at each step of one device that has as many batches as a rank has under DDP."""

    def script(folder: Path) -> None:
        module = make_module()
        fork_trainer(folder, 1, "auto", **arguments).fit(module, loader(samples // RANKS), loader(12))
        torch.save(module.rates, folder / "rates.pt")

    run = launch(script, folder)
    assert run.returncode == 0, run.output
    return list(torch.load(folder / "rates.pt"))


class WarmedUpByHand(Scheduled):
    """Sets the learning rate of each step itself, as Lightning's documentation shows it."""

    def __init__(self) -> None:
        super().__init__(step_lr)

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.parameters(), lr=0.01)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 20)
        optimizer.step(closure=optimizer_closure)


BY_STEP = "learning rate schedulers by step and by epoch, with `frequency`"


@pytest.mark.parametrize(
    ("make_module", "batches"),
    [
        pytest.param(functools.partial(Scheduled, make), batches, id=f"{make.__name__}-{batches}", marks=marks)
        for make, batches, marks in [
            (step_lr, "shared", pytest.mark.compatibility("Optimization", BY_STEP)),
            (step_lr, "sharded", ()),
            (every_third_step, "shared", pytest.mark.compatibility("Optimization", BY_STEP)),
            (each_epoch, "shared", pytest.mark.compatibility("Optimization", BY_STEP)),
            (
                one_cycle,
                "shared",
                pytest.mark.compatibility("Optimization", "`OneCycleLR` with `trainer.estimated_stepping_batches`"),
            ),
            (
                warm_up_then_cosine,
                "shared",
                pytest.mark.compatibility("Optimization", "`LinearLR` warm-up, then cosine (`SequentialLR`)"),
            ),
        ]
    ]
    + [
        pytest.param(
            WarmedUpByHand,
            "shared",
            id="by-hand",
            marks=[
                pytest.mark.compatibility("Optimization", 'a hand-written warm-up that sets `param_groups[i]["lr"]`'),
                pytest.mark.compatibility("Optimization", "`optimizer_step` overridden"),
            ],
        )
    ],
)
def test_each_update_has_the_learning_rate_that_ddp_has_at_the_step_it_was_computed_at(
    tmp_path: Path, make_module: Callable[[], Scheduled], batches: str
) -> None:
    arguments: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 0.5}

    run = train(tmp_path, make_module, {"batches": batches}, samples=192, validation_samples=12, **arguments)

    rates = rates_of_lightning(tmp_path, make_module, 192, **arguments)
    updates = run.report(0)["updates"]
    assert (len(rates), len(updates)) == (32, 96)
    assert len(set(rates)) > 1
    for update in updates:
        assert update["lrs"] == pytest.approx([rates[update["read"] // RANKS]], rel=1e-12)
