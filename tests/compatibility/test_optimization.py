"""Optimization: what is pushed and what the holder makes of it is what DDP's optimizer would have been given."""

from __future__ import annotations

import csv
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
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
            (step_lr, "sharded", pytest.mark.soak),
            (every_third_step, "shared", (pytest.mark.compatibility("Optimization", BY_STEP), pytest.mark.soak)),
            (each_epoch, "shared", pytest.mark.compatibility("Optimization", BY_STEP)),
            (
                one_cycle,
                "shared",
                pytest.mark.compatibility(
                    "Optimization",
                    "`OneCycleLR` with `trainer.estimated_stepping_batches`",
                    note="It counts DDP's steps, up to one an epoch more than here: DDP repeats samples, and makes an "
                    "update of each rank's leftover, so that all ranks have equal shares.",
                ),
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


class Skipping(Reporting):
    """Gives no loss for some of every four batches that a rank computes."""

    def __init__(self, skipped: tuple[int, ...] = (3,)) -> None:
        super().__init__()
        self.skipped = skipped

    def on_fit_start(self) -> None:
        # Lightning tells whoever returns None.
        warnings.filterwarnings("ignore", "`training_step` returned `None`")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 4 in self.skipped else loss


@pytest.mark.compatibility(
    "Optimization",
    "`training_step` that returns None for some batches",
    note="Such a batch counts as done and makes no step. Lightning itself refuses it under DDP "
    "([#5243](https://github.com/Lightning-AI/pytorch-lightning/issues/5243)).",
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_a_batch_without_a_loss_is_done_and_makes_no_update(tmp_path: Path, batches: str) -> None:
    run = train(tmp_path, Skipping, {"batches": batches})

    ranks, updates = run.reports(), run.report(0)["updates"]
    assert sum(rank["batches"] for rank in ranks) == 24
    with_loss = [rank["batches"] - rank["batches"] // 4 for rank in ranks]
    assert [sum(update["worker"] == rank for update in updates) for rank in range(RANKS)] == with_loss
    assert ranks[0]["version"] == sum(with_loss) < 24
    assert [len(update["tickets"]) for update in updates] == [1] * len(updates)


def test_batches_without_a_loss_do_not_count_towards_max_steps(tmp_path: Path) -> None:
    run = train(tmp_path, Skipping, max_steps=6, max_epochs=-1)

    assert (run.report(0)["version"], run.report(0)["step"]) == (18, 6)
    assert sum(rank["batches"] for rank in run.reports()) > 18


def test_accumulated_batches_make_no_update_only_if_none_of_them_has_a_loss(tmp_path: Path) -> None:
    # Of the blocks of two: one batch of the first, none of the second, and so on.
    run = train(tmp_path, lambda: Skipping((1, 2, 3)), accumulate_grad_batches=2)

    updates = run.report(0)["updates"]
    blocks = [rank["batches"] // 2 for rank in run.reports()]
    assert sum(blocks) == 12
    assert [sum(update["worker"] == rank for update in updates) for rank in range(RANKS)] == [
        -(-n // 2) for n in blocks
    ]
    assert [len(update["tickets"]) for update in updates] == [2] * len(updates)


class Hooked(Reporting):
    """Writes its own gradients in the hooks before a step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.fill_(3.0)  # type: ignore[union-attr]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        assert gradient_clip_val == 1.0
        first = [parameter for name, parameter in self.named_parameters() if name.startswith("net.0")]
        for parameter in first:
            parameter.grad.clamp_(max=gradient_clip_val)  # type: ignore[union-attr]


@pytest.mark.compatibility("Optimization", "`on_before_optimizer_step` and `configure_gradient_clipping` overridden")
def test_what_hooks_do_to_gradients_is_what_is_pushed(tmp_path: Path) -> None:
    run = train(tmp_path, Hooked, gradient_clip_val=1.0)

    updates = run.report(0)["updates"]
    assert len(updates) == 24
    for update in updates:
        assert [gradient.unique().tolist() for gradient in update["gradients"]] == [[1.0], [1.0], [3.0], [3.0]]


class Unusual(Reporting):
    """Two param groups, tied weights, and layers that are used in some steps, or never, or frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight
        self.sometimes = nn.Linear(6, 2)
        self.never = nn.Linear(2, 2)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 2)
        self.uses = 0
        self.begin = {name: value.clone() for name, value in self.state_dict().items()}

    def loss(self, batch: Any) -> Tensor:
        hidden = self.frozen(self.decoder(self.encoder(batch[0]).relu()))
        logits = self.head(hidden)
        if self.batches % 3 == 0:
            self.uses += 1
            logits = logits + self.sometimes(hidden)
        return nn.functional.cross_entropy(logits, batch[1])

    def groups(self) -> list[dict[str, Any]]:
        named = dict(self.named_parameters())
        weights = [parameter for name, parameter in named.items() if name.endswith("weight")]
        biases = [parameter for name, parameter in named.items() if name.endswith("bias")]
        return [
            {"params": weights, "lr": 3e-2, "weight_decay": 0.05},
            {"params": biases, "lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6},
        ]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.groups(), amsgrad=True)

    def facts(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return {
            "begin": self.begin,
            "uses": self.uses,
            "order": [[names[id(parameter)] for parameter in group["params"]] for group in self.groups()],
            "tied": self.decoder.weight is self.encoder.weight,
            "state": {name: value.clone() for name, value in self.state_dict().items()},
        }


@pytest.mark.compatibility("Optimization", "several param groups")
@pytest.mark.compatibility("Optimization", "parameters unused in some steps, or never", note="No flag is needed.")
@pytest.mark.compatibility("Optimization", "weight tying")
@pytest.mark.compatibility("Optimization", "frozen parameters")
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_torchs_adamw_makes_the_same_of_what_was_pushed(tmp_path: Path, batches: str) -> None:
    run = train(tmp_path, Unusual, {"batches": batches}, max_epochs=2)

    first = run.report(0)
    module = Unusual()
    module.load_state_dict(first["begin"])
    optimizer = torch.optim.AdamW(module.groups(), amsgrad=True, fused=True)
    named = dict(module.named_parameters())
    order = [name for group in first["order"] for name in group]
    for update in first["updates"]:
        for name, gradient in zip(order, update["gradients"], strict=True):
            named[name].grad = gradient
        optimizer.step()
    uses = sum(rank["uses"] for rank in run.reports())
    assert 0 < uses < 48
    assert first["holder"][0]["state"][order.index("sometimes.weight")]["step"] == uses
    assert first["holder"][0]["state"][order.index("head.weight")]["step"] == 48
    for rank in run.reports():
        assert rank["tied"]
        assert torch.equal(rank["state"]["decoder.weight"], rank["state"]["encoder.weight"])
        assert [name for name in named if not torch.equal(named[name], rank["parameters"][name])] == []
    assert torch.equal(first["parameters"]["frozen.weight"], first["begin"]["frozen.weight"])
    assert not torch.equal(first["parameters"]["encoder.weight"], first["begin"]["encoder.weight"])


@pytest.mark.compatibility("Optimization", "`GradientAccumulationScheduler`")
def test_a_number_of_batches_to_accumulate_can_change_with_the_epoch(tmp_path: Path) -> None:
    run = train(tmp_path, Reporting, max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})])

    updates = run.report(0)["updates"]
    assert [len(update["tickets"]) for update in updates] == [1] * 24 + [4] * 6


class ByPlateau(Scheduled):
    """Watches a metric that never improves."""

    def __init__(self, interval: str, patience: int) -> None:
        super().__init__(step_lr)
        self.interval = interval
        self.patience = patience

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("score", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/score", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = AMSGrad(self.parameters(), lr=0.01)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=self.patience)
        monitor = "score" if self.interval == "step" else "val/score"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "monitor": monitor},
        }


@pytest.mark.compatibility("Optimization", "`ReduceLROnPlateau` by epoch")
def test_a_plateau_by_epoch_is_seen_when_ddp_sees_it(tmp_path: Path) -> None:
    make_module = functools.partial(ByPlateau, "epoch", 0)

    run = train(tmp_path, make_module, samples=96, validation_samples=12, max_epochs=3)

    rates = rates_of_lightning(tmp_path, make_module, 96, max_epochs=3)
    updates = run.report(0)["updates"]
    assert rates == [0.01] * 16 + [0.005] * 8
    assert [update["lrs"] for update in updates] == [[rates[update["read"] // RANKS]] for update in updates]


PLATEAU_BY_STEP = (
    "Each rank watches its own values until the next stop; there all take rank 0's scheduler. "
    "Under DDP they never agree unless the value is reduced."
)


@pytest.mark.compatibility("Optimization", "`ReduceLROnPlateau` by step", "differs", PLATEAU_BY_STEP)
def test_a_plateau_by_step_is_looked_for_once_for_each_step_of_the_clock(tmp_path: Path) -> None:
    make_module = functools.partial(ByPlateau, "step", 4)

    run = train(tmp_path, make_module, samples=132, validation_samples=12)

    rates = rates_of_lightning(tmp_path, make_module, 132)
    assert rates == [0.01] * 6 + [0.005] * 5
    for rank in run.reports():
        # The eleventh step, which no batch of rank 0's may have seen, is the fifth without an improvement.
        assert (rank["step"], rank["lrs"]) == (11, [[0.0025]])
    for update in run.report(0)["updates"]:
        clock = update["read"] // RANKS
        # A segment's first batch may wait for parameters that are some steps on.
        assert update["lrs"][0] in rates[max(0, clock - 3) : clock + 1]


@pytest.mark.compatibility("Optimization", "`ReduceLROnPlateau` by step", "differs", PLATEAU_BY_STEP)
def test_at_each_stop_all_ranks_take_rank_0s_plateau(tmp_path: Path) -> None:
    class OnlyRankZeroImproves(ByPlateau):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("score", 1.0 if self.global_rank else -float(self.batches))
            return loss

    run = train(
        tmp_path,
        lambda: OnlyRankZeroImproves("step", 0),
        {"batches": "sharded"},
        samples=192,
        validation_samples=12,
        val_check_interval=0.5,
    )

    updates = run.report(0)["updates"]
    assert any(update["lrs"] != [0.01] for update in updates)
    for rank in range(RANKS):
        first = next(update for update in updates if update["worker"] == rank and update["read"] >= 24)
        assert first["lrs"] == [0.01]
    assert [rank["lrs"] for rank in run.reports()] == [[[0.01]]] * RANKS


@pytest.mark.compatibility("Optimization", "`LearningRateMonitor`", note="Shows the learning rate of rank 0's pushes.")
def test_the_learning_rate_monitor_shows_what_the_holder_used(tmp_path: Path) -> None:
    monitor, logger = LearningRateMonitor("step"), CSVLogger(tmp_path / "logs", name="", version="")

    run = train(
        tmp_path,
        functools.partial(Scheduled, one_cycle),
        samples=192,
        logger=logger,
        callbacks=[monitor],
        log_every_n_steps=1,
    )

    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("lr-AMSGrad")]
    used = {update["lrs"][0] for update in run.report(0)["updates"] if update["worker"] == 0}
    assert len(rows) > 4
    for row in rows:
        assert any(float(row["lr-AMSGrad"]) == pytest.approx(rate, rel=1e-9) for rate in used)
