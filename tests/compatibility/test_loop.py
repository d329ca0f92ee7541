"""Where the loop starts, validates, logs and ends: the Trainer's arguments mean what they mean under DDP."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_async import AsyncAMSGradStrategy
from tests.every_rank import run_on_every_rank
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader

RANKS = 2
UNEVEN = (0.001, 0.004)


def row(name: str, *arguments: Any, **values: Any) -> Any:
    """A parameter set that proves a row of the table."""
    return pytest.param(*arguments, marks=pytest.mark.compatibility("Loop", name, **values), id=name)


def soaked_row(name: str, *arguments: Any) -> Any:
    """Another set for a row, which `make soak` takes alone."""
    marks = [pytest.mark.compatibility("Loop", name), pytest.mark.soak]
    return pytest.param(*arguments, marks=marks, id=name)


class Watched(TinyClassifier):
    """Notes what it trained on, and at which step and on how many batches it validated."""

    def __init__(self, folder: Path) -> None:
        super().__init__(sleep_s=UNEVEN)
        self.folder = folder
        self.validations: list[tuple[bool, int, int]] = []
        self.validated = 0

    def on_validation_start(self) -> None:
        self.validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1
        super().validation_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        self.validations.append((self.trainer.sanity_checking, self.trainer.global_step, self.validated))

    def on_fit_end(self) -> None:
        trainer: Any = self.trainer
        report(
            self.folder,
            self.global_rank,
            agreed={
                "validations": self.validations,
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "epochs begun": len(self.seen),
                "batches of an epoch": trainer.num_training_batches,
            },
            seen=self.seen,
            batches=self.batches,
        )


@pytest.mark.parametrize(
    "arguments",
    [
        row("max_epochs", {"max_epochs": 3}),
        soaked_row("limit_val_batches (int and float)", {"limit_val_batches": 2}),
        row("limit_val_batches (int and float)", {"limit_val_batches": 0.5}),
        row("num_sanity_val_steps", {"num_sanity_val_steps": 2}),
        soaked_row("num_sanity_val_steps", {"num_sanity_val_steps": -1}),
        soaked_row("overfit_batches (int and float)", {"overfit_batches": 2, "max_epochs": 2}),
        row("overfit_batches (int and float)", {"overfit_batches": 0.25, "max_epochs": 2}),
        soaked_row("fast_dev_run", {"fast_dev_run": True}),
        row("fast_dev_run", {"fast_dev_run": 3}),
    ],
)
def test_an_argument_makes_the_run_that_it_makes_under_ddp(tmp_path: Path, arguments: dict[str, Any]) -> None:
    def script(folder: Path) -> None:
        for name in ("ddp", "shared", "sharded"):
            (folder / name).mkdir()
            ours = None if name == "ddp" else AsyncAMSGradStrategy(start_method="fork", batches=name)
            trainer = fork_trainer(folder, RANKS, ours or "ddp_fork", **arguments)
            trainer.fit(Watched(folder / name), loader(96), loader(40))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ddp = reports(tmp_path / "ddp")
    for ours in (reports(tmp_path / "shared"), reports(tmp_path / "sharded")):
        assert [rank["agreed"] for rank in ours] == [rank["agreed"] for rank in ddp]
        assert all(samples(ours, epoch) == samples(ddp, epoch) for epoch in range(epochs(ddp)))
        assert epochs(ours) == epochs(ddp)
        assert sum(rank["batches"] for rank in ours) == sum(rank["batches"] for rank in ddp) > 0


def reports(folder: Path) -> list[dict[str, Any]]:
    """What every rank of a run has reported."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def epochs(ranks: list[dict[str, Any]]) -> int:
    """How many epochs all ranks have begun."""
    (begun,) = {len(rank["seen"]) for rank in ranks}
    return begun


def samples(ranks: list[dict[str, Any]], epoch: int) -> list[int]:
    """What all ranks together trained on in an epoch."""
    return sorted(index for rank in ranks for index in rank["seen"][epoch])


def assert_ended_together(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["agreed"] == ranks[0]["agreed"] for rank in ranks)


@pytest.mark.compatibility(
    "Loop",
    "min_steps",
    status="differs",
    note="A stop at min_steps takes effect when the batches that are out by then have been applied: about one for each "
    "rank.",
)
def test_a_stop_before_min_steps_waits_for_them(tmp_path: Path) -> None:
    class Hasty(Watched):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = True

    def script(folder: Path) -> None:
        for strategy in ("ddp_fork", "async_amsgrad_fork"):
            (folder / strategy).mkdir()
            trainer = fork_trainer(folder, RANKS, strategy, max_epochs=9, min_steps=17)
            trainer.fit(Hasty(folder / strategy), loader(96), loader(40))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ddp, ours = (reports(tmp_path / strategy) for strategy in ("ddp_fork", "async_amsgrad_fork"))
    assert_ended_together(ours)
    assert ours[0]["agreed"]["epoch"] == ddp[0]["agreed"]["epoch"]
    assert ours[0]["agreed"]["epochs begun"] == ddp[0]["agreed"]["epochs begun"] == 2
    assert ddp[0]["agreed"]["step"] == 17 <= ours[0]["agreed"]["step"] <= 17 + 2
    assert len(ours[0]["agreed"]["validations"]) == len(ddp[0]["agreed"]["validations"])


LIMIT_S = 0.2
INTERVAL_S = 0.05


@pytest.mark.parametrize(
    ("arguments", "ends_an_epoch"),
    [
        row("max_time", {"max_time": timedelta(seconds=LIMIT_S)}, False),
        row("Timer", {"callbacks": [Timer(timedelta(seconds=LIMIT_S))]}, False),
        row("Timer", {"callbacks": [Timer(timedelta(seconds=LIMIT_S), interval="epoch")]}, True),
    ],
)
def test_a_limit_of_time_ends_all_ranks_together(
    tmp_path: Path, arguments: dict[str, Any], ends_an_epoch: bool
) -> None:
    class Timed(Watched):
        def on_train_start(self) -> None:
            self.started = time.monotonic()

        def on_train_end(self) -> None:
            assert time.monotonic() - self.started >= LIMIT_S

    def script(folder: Path) -> None:
        fork_trainer(folder, RANKS, max_epochs=-1, **arguments).fit(Timed(folder), loader(2400), loader(40))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ranks = run.reports()
    assert_ended_together(ranks)
    assert (sum(rank["batches"] for rank in ranks) % 600 == 0) == ends_an_epoch
    # As under DDP the last thing is a validation.
    sanity, step, _ = ranks[0]["agreed"]["validations"][-1]
    assert (sanity, step) == (False, ranks[0]["agreed"]["step"])


@pytest.mark.compatibility(
    "Loop", "val_check_interval (by time)", note="Rank 0's clock decides; the others validate with it."
)
def test_a_time_between_validations_is_kept_and_no_batch_is_lost(tmp_path: Path) -> None:
    class Timed(Watched):
        def on_train_start(self) -> None:
            self.started = time.monotonic()

        def on_train_end(self) -> None:
            torch.save(time.monotonic() - self.started, self.folder / "seconds.pt")

    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, RANKS, max_epochs=1, val_check_interval=timedelta(seconds=INTERVAL_S))
        trainer.fit(Timed(folder), loader(1200), loader(40))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ranks = run.reports()
    assert_ended_together(ranks)
    assert samples(ranks, 0) == list(range(1200))
    steps = [step for _, step, _ in ranks[0]["agreed"]["validations"]]
    # None of them at the epoch's end, as under DDP, and no two within an interval.
    assert 1 < len(steps) <= torch.load(tmp_path / "seconds.pt") / INTERVAL_S
    assert steps == sorted(steps)


@pytest.mark.compatibility(
    "Loop",
    "log_every_n_steps",
    status="differs",
    note="Steps of the clock that all ranks share. If it passes several multiples during one batch of rank 0, "
    "rank 0 logs once.",
)
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_rank_0_logs_whenever_the_clock_has_passed_a_multiple(tmp_path: Path, slow_rank: int) -> None:
    class Logging(Watched):
        logs = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("clock", float(self.trainer.global_step))
            return super().training_step(batch, batch_idx)

    def script(folder: Path) -> None:
        module = Logging(folder)
        module.sleep_s = UNEVEN if slow_rank else UNEVEN[::-1]
        logger = CSVLogger(folder / "logs", name="", version="")
        trainer = fork_trainer(folder, RANKS, logger=logger, log_every_n_steps=5, max_epochs=2)
        trainer.fit(module, loader(208), loader(40))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = [int(row["step"]) for row in rows if row["train/loss_step"]]
    # Two epochs of 26 steps.
    assert all((step + 1) % 5 == 0 for step in logged)
    assert logged == sorted(set(logged))
    # Of ten multiples: with this bound on staleness the clock passes no two of them during one batch.
    assert len(logged) >= 6


@pytest.mark.compatibility(
    "Loop",
    "trainer.is_last_batch",
    status="differs",
    note="False in every batch: while a rank computes one, nobody knows whether there will be another for it. What is "
    "to be done once an epoch, such as stepping a scheduler by hand, goes into on_train_epoch_end.",
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_what_is_to_be_done_once_an_epoch_is_done_at_its_end(tmp_path: Path, batches: Any) -> None:
    class ByHand(Watched):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.automatic_optimization = False
            self.last = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.last += self.trainer.is_last_batch

        def on_train_epoch_end(self) -> None:
            scheduler: Any = self.lr_schedulers()
            scheduler.step()

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def on_fit_end(self) -> None:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            report(self.folder, self.global_rank, last=self.last, lr=lr, batches=self.batches)

    def script(folder: Path) -> None:
        strategy = AsyncAMSGradStrategy(start_method="fork", batches=batches)
        fork_trainer(folder, RANKS, strategy, max_epochs=3).fit(ByHand(folder), loader(96))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert [(rank["last"], rank["lr"]) for rank in run.reports()] == [(0, 0.01 * 0.5**3)] * RANKS
    assert sum(rank["batches"] for rank in run.reports()) == 3 * 24


@pytest.mark.compatibility(
    "Loop", "SLURM's signal to requeue (SIGUSR1)", note="Takes effect between two batches of rank 0."
)
def test_a_job_that_slurm_requeues_is_saved_between_two_batches_and_goes_on_from_there(tmp_path: Path) -> None:
    class Signalled(TinyClassifier):
        def on_train_start(self) -> None:
            self.began = self.trainer.strategy.version
            if self.current_epoch == 0 and self.began == 0:
                # At any place of a step: a push, an update, the wait for an answer.
                threading.Thread(target=self.signal, daemon=True).start()

        def signal(self) -> None:
            for _ in range(20):
                time.sleep(0.007)
                os.kill(os.getpid(), signal.SIGUSR1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # An epoch that is gone on with has no start.
            self.seen = self.seen or [[]]
            return super().training_step(batch, batch_idx)

        def on_train_end(self) -> None:
            report(tmp_path, self.global_rank, began=self.began, step=self.trainer.global_step)

    def train() -> None:
        rank, tasks = os.environ["RANK"], str(RANKS)
        os.environ |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a", "SLURM_NTASKS": tasks, "SLURM_PROCID": rank}
        os.environ |= {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}
        os.environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        for epochs in (2, 3):
            trainer = fork_trainer(tmp_path, RANKS, "async_amsgrad", max_epochs=epochs, plugins=[SLURMEnvironment()])
            trainer.fit(Signalled(UNEVEN), loader(480))

    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued.txt\n')
    (tmp_path / "scontrol").chmod(0o755)

    run = launch(lambda folder: run_on_every_rank(RANKS, train), tmp_path)

    assert run.returncode == 0, run.output
    assert set((tmp_path / "requeued.txt").read_text().splitlines()) == {"requeue 7"}
    last = max(tmp_path.glob("hpc_ckpt_*.ckpt"), key=lambda path: int(path.stem.removeprefix("hpc_ckpt_")))
    checkpoint = torch.load(last)
    version = checkpoint["async_amsgrad"]["version"]
    assert {int(values["step"]) for values in checkpoint["optimizer_states"][0]["state"].values()} == {version}
    assert [(rank["began"], rank["step"]) for rank in run.reports()] == [(version, 180)] * RANKS
