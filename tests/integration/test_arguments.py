"""Trainer arguments mean what they mean under DDP: n per rank is n * N over all ranks."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from tests.launch import launch, report
from tests.models import Recorder, TinyClassifier, fork_trainer, loader

RANKS = 3
UNEVEN = (0.001, 0.002, 0.004)


class Counting(TinyClassifier):
    """Notes at which version it validated, and what it computed."""

    def __init__(self) -> None:
        super().__init__(sleep_s=UNEVEN)
        self.validated: list[int] = []

    def on_validation_start(self) -> None:
        self.validated.append(self.trainer.strategy.version)

    def on_train_end(self) -> None:
        report(
            Path.cwd(),
            self.global_rank,
            validated=self.validated,
            batches=self.batches,
            version=self.trainer.strategy.version,
            step=self.trainer.global_step,
            epoch=self.trainer.current_epoch,
            lrs=[group["lr"] for group in self.trainer.optimizers[0].param_groups],
        )


@pytest.mark.compatibility("Loop", "limit_train_batches (int and float)")
@pytest.mark.compatibility("Loop", "val_check_interval (int and float)")
@pytest.mark.compatibility("Loop", "check_val_every_n_epoch (also None)")
@pytest.mark.parametrize(
    ("arguments", "validated", "tickets"),
    [
        pytest.param({"val_check_interval": 4}, [12, 24, 36, 48], 48, marks=pytest.mark.soak),
        ({"val_check_interval": 0.5, "max_epochs": 2}, [24, 48, 72, 96], 96),
        pytest.param({"limit_train_batches": 5}, [15], 15, marks=pytest.mark.soak),
        ({"limit_train_batches": 0.5}, [24], 24),
        ({"limit_train_batches": 5, "val_check_interval": 2}, [6, 12], 15),
        (
            {"val_check_interval": 10, "check_val_every_n_epoch": None, "max_epochs": 2},
            [30, 60, 90],
            96,
        ),
        ({"check_val_every_n_epoch": 2, "max_epochs": 3, "limit_train_batches": 3}, [18], 27),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_intervals_and_limits_are_counted_per_rank(
    tmp_path: Path, arguments: dict[str, Any], validated: list[int], tickets: int
) -> None:
    def script(folder: Path) -> None:
        fork_trainer(folder, RANKS, **arguments).fit(Counting(), loader(192), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ranks = run.reports()
    assert sum(rank["batches"] for rank in ranks) == tickets
    for rank in ranks:
        assert rank["validated"] == validated
        assert (rank["version"], rank["step"]) == (tickets, tickets // RANKS)


@pytest.mark.compatibility("Loop", "max_steps")
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"max_steps": 7}),
        ({}, {"max_steps": 21, "val_check_interval": 5}),
        ({}, {"max_steps": 11, "accumulate_grad_batches": 2}),
        ({"max_staleness": 1, "on_stale": "drop"}, {"max_steps": 20}),
        ({"batches": "sharded"}, {"max_steps": 20}),
    ],
    ids=["within-an-epoch", "across-epochs", "accumulated", "drop", "sharded"],
)
def test_max_steps_is_an_exact_number_of_updates(
    tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    def script(folder: Path) -> None:
        strategy = AsyncAMSGradStrategy(start_method="fork", **options)
        # 47 batches: no multiple of the number of ranks, nor of the accumulated batches.
        trainer = fork_trainer(folder, RANKS, strategy, max_epochs=-1, **arguments)
        trainer.fit(Counting(), loader(188), loader(24))
        torch.save(trainer.strategy.stats.updates, folder / "updates.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    steps = arguments["max_steps"]
    assert torch.load(tmp_path / "updates.pt") == steps * RANKS
    assert [(rank["version"], rank["step"]) for rank in run.reports()] == [(steps * RANKS, steps)] * RANKS


@pytest.mark.compatibility(
    "Optimization",
    "`accumulate_grad_batches`, also the leftover at an epoch's end",
    note="The leftover makes one update over all ranks, where each rank makes one under DDP.",
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_accumulated_batches_make_one_update_and_only_an_epochs_last_one_is_smaller(
    tmp_path: Path, batches: Any
) -> None:
    def script(folder: Path) -> None:
        recorder = Recorder()

        class Module(Counting):
            def on_train_end(self) -> None:
                super().on_train_end()
                if self.global_rank == 0:
                    torch.save(recorder.updates, folder / "updates.pt")

        strategy = AsyncAMSGradStrategy(batches=batches, start_method="fork")
        strategy.observers.append(recorder)
        trainer = fork_trainer(folder, RANKS, strategy, accumulate_grad_batches=4, val_check_interval=3)
        trainer.fit(Module(), loader(188), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    updates = torch.load(tmp_path / "updates.pt")
    assert sorted(ticket for update in updates for ticket in update["tickets"]) == list(range(47))
    assert sorted(len(update["tickets"]) for update in updates) == [3] + [4] * 11
    # Every 9 batches, after the last whole update before.
    assert run.report(0)["validated"] == [9 // 4, 18 // 4, 27 // 4, 36 // 4, 45 // 4]


@pytest.mark.compatibility("Optimization", "gradient clipping by norm")
def test_gradients_are_clipped_before_they_are_pushed(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        norms: list[float] = []

        def observe(update: Any, tickets: tuple[int, ...]) -> None:
            norms.append(torch.cat([gradient.reshape(-1) for gradient in update.push.gradients]).norm().item())

        class Module(Counting):
            def on_train_end(self) -> None:
                report(folder, self.global_rank, norms=norms)

        strategy = AsyncAMSGradStrategy(start_method="fork")
        strategy.observers.append(observe)
        fork_trainer(folder, RANKS, strategy, gradient_clip_val=0.01).fit(Module(), loader(96))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    norms = run.report(0)["norms"]
    assert norms == pytest.approx([0.01] * 24, rel=1e-3)


def step_lr(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5), "interval": "step"}


def every_third_step(optimizer: Any) -> dict[str, Any]:
    return {**step_lr(optimizer), "frequency": 3}


def one_cycle(optimizer: Any) -> dict[str, Any]:
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=32)
    return {"scheduler": scheduler, "interval": "step"}


def each_epoch(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": lr_scheduler.ExponentialLR(optimizer, gamma=0.1), "interval": "epoch"}


@pytest.mark.parametrize(
    ("make_scheduler", "times"), [(step_lr, 31), (every_third_step, 10), (one_cycle, 31), (each_epoch, 2)]
)
def test_schedulers_follow_the_clock_that_all_ranks_share(
    tmp_path: Path, make_scheduler: Callable[[Any], dict[str, Any]], times: int
) -> None:
    def script(folder: Path) -> None:
        class Module(Counting):
            def configure_optimizers(self) -> Any:
                optimizer = AMSGrad(self.parameters(), lr=0.01)
                return {"optimizer": optimizer, "lr_scheduler": make_scheduler(optimizer)}

            def on_fit_start(self) -> None:
                assert self.trainer.estimated_stepping_batches == 32

        # Twice 47 batches on 3 ranks: 31 steps of the clock.
        fork_trainer(folder, RANKS, max_epochs=2).fit(Module(), loader(188))

    run = launch(script, tmp_path)

    optimizer = AMSGrad([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = make_scheduler(optimizer)["scheduler"]
    optimizer.step()
    for _ in range(times):
        scheduler.step()
    assert run.returncode == 0, run.output
    for rank in run.reports():
        assert rank["step"] == 31
        assert rank["lrs"] == pytest.approx([optimizer.param_groups[0]["lr"]], rel=1e-12)


@pytest.mark.compatibility("Tools", "RichProgressBar, TQDMProgressBar")
@pytest.mark.parametrize("progress_bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_run(tmp_path: Path, progress_bar: Any) -> None:
    def script(folder: Path) -> None:
        arguments = {"val_check_interval": 0.5, "num_sanity_val_steps": 1, "enable_progress_bar": True}
        trainer = fork_trainer(folder, 2, callbacks=[progress_bar(refresh_rate=1)], **arguments)
        trainer.fit(Counting(), loader(48), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert "Epoch 0" in run.output


@pytest.mark.compatibility("Tools", "CSVLogger")
def test_the_logger_gets_the_asynchronous_metrics(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        logger = CSVLogger(folder / "logs", name="", version="")
        trainer = fork_trainer(folder, RANKS, logger=logger, log_every_n_steps=4)
        module = Counting()
        module.logs = True
        trainer.fit(module, loader(192), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    rows = read_csv(tmp_path / "logs" / "metrics.csv")
    ours = [row for row in rows if row.get("async/version")]
    assert len(ours) >= 4
    versions = [float(row["async/version"]) for row in ours]
    steps = [int(row["step"]) for row in ours]
    assert versions == sorted(versions)
    assert versions[-1] == 48
    assert steps == sorted(steps)
    assert steps[-1] == 15
    for row in ours:
        assert sum(float(row[f"async/share_rank_{rank}"]) for rank in range(RANKS)) == pytest.approx(1)
        low, mean, high = 0.0, float(row["async/staleness_mean"]), float(row["async/staleness_max"])
        assert low <= mean <= high <= 4 * RANKS
        assert low <= float(row["async/staleness_p95"]) <= high
        assert float(row["async/updates_per_second"]) > 0
        assert float(row["async/wait_fraction"]) >= 0
        assert float(row["async/dropped"]) == float(row["async/rejected"]) == 0
    losses = [row for row in rows if row.get("train/loss_step")]
    assert len(losses) >= 3
    assert [row for row in rows if row.get("val/loss")]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
