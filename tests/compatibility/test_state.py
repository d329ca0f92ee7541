"""Checkpoints: when they are saved, what ends up in them, and who can go on from them."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_async import AsyncAMSGradStrategy
from tests.every_rank import run_on_every_rank
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader

RANKS = 3
UNEVEN = (0.001, 0.002, 0.004)


def fit(
    folder: Path,
    module: TinyClassifier,
    *callbacks: Any,
    start_method: Any = "fork",
    samples: int = 124,
    **arguments: Any,
) -> Trainer:
    """Fits on uneven ranks; leaves the holder's parameters of every version behind, however the run ends."""
    strategy = AsyncAMSGradStrategy(start_method=start_method)
    (folder / "versions").mkdir(exist_ok=True)

    def keep(update: Any, tickets: tuple[int, ...]) -> None:
        assert strategy.engine is not None
        assert strategy.engine.local_service is not None
        torch.save(strategy.engine.local_service.holder._flat, folder / "versions" / f"{update.version}.pt")

    strategy.observers.append(keep)
    arguments = {"callbacks": [*callbacks], "enable_checkpointing": True} | arguments
    trainer = fork_trainer(folder, RANKS, strategy, **arguments)
    trainer.fit(module, loader(samples))
    return trainer


def read_checkpoint(path: Path, folder: Path) -> dict[str, Any]:
    """A checkpoint whose parameters are those of the version that its optimizer state has counted."""
    checkpoint: dict[str, Any] = torch.load(path)
    version = checkpoint["async_amsgrad"]["version"]
    parameters = torch.cat([value.reshape(-1) for value in checkpoint["state_dict"].values()])
    assert torch.equal(parameters, torch.load(folder / "versions" / f"{version}.pt"))
    assert {int(values["step"]) for values in checkpoint["optimizer_states"][0]["state"].values()} == {version}
    return checkpoint


@pytest.mark.compatibility("State", "ModelCheckpoint(train_time_interval=...)")
def test_checkpoints_by_time_are_an_interval_apart(tmp_path: Path) -> None:
    interval_s = 0.05

    class Timed(TinyClassifier):
        def on_train_start(self) -> None:
            self.began = time.monotonic()

        def on_train_end(self) -> None:
            report(tmp_path, self.global_rank, seconds=time.monotonic() - self.began)

    def script(folder: Path) -> None:
        interval = timedelta(seconds=interval_s)
        often = ModelCheckpoint(folder / "checkpoints", "{step}", train_time_interval=interval, save_top_k=-1)
        fit(folder, Timed(UNEVEN), often, samples=1200)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    paths = list((tmp_path / "checkpoints").iterdir())
    for path in paths:
        read_checkpoint(path, tmp_path)
    assert 2 <= len(paths) <= run.report(0)["seconds"] / interval_s


@pytest.mark.compatibility(
    "State",
    "ModelCheckpoint(save_on_exception=True), OnExceptionCheckpoint",
    note="Whichever rank fails; DDP hangs (Lightning #20187). Not with forked or spawned ranks, whatever the strategy: "
    "Lightning then calls on_exception in the process that has started them.",
)
@pytest.mark.parametrize("rank", [0, 2])
def test_an_exception_on_any_rank_leaves_a_checkpoint_of_the_holder(tmp_path: Path, rank: int) -> None:
    class Failing(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_rank == rank and self.batches == 5:
                raise ValueError("no more")
            return super().training_step(batch, batch_idx)

    def fail() -> None:
        # What Lightning says wherever there is an OnExceptionCheckpoint.
        warnings.filterwarnings("ignore", ".*was called without a model")
        warnings.filterwarnings("ignore", ".*there is no last checkpoint available")
        by_flag = ModelCheckpoint(tmp_path / "by_flag", save_on_exception=True)
        by_callback = OnExceptionCheckpoint(tmp_path / "by_callback")
        fit(tmp_path, Failing(UNEVEN), by_flag, by_callback, start_method="popen", samples=1200)

    run = launch(lambda folder: run_on_every_rank(RANKS, fail), tmp_path)

    assert run.returncode == 1, run.output
    assert "ValueError: no more" in run.output
    for saved in ("by_flag", "by_callback"):
        (path,) = (tmp_path / saved).iterdir()
        assert read_checkpoint(path, tmp_path)["global_step"] >= 5 // RANKS


@pytest.mark.compatibility("State", "trainer.save_checkpoint from user code in mid-epoch, on rank 0 or on all ranks")
def test_user_code_on_all_ranks_saves_one_version_in_mid_epoch(tmp_path: Path) -> None:
    class Saving(TinyClassifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            # At as many different steps as there are ranks.
            if batch_idx == 2:
                self.trainer.save_checkpoint(tmp_path / "mid.ckpt")

        def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
            # Lightning has noted the step by now; the others go on while it asks for the parameters.
            engine = self.trainer.strategy.engine
            while engine is not None and engine.service is not None and engine.service.progress()[0] < 4 * RANKS:
                time.sleep(0.001)
            return super().state_dict(*arguments, **keywords)

    run = launch(lambda folder: fit(folder, Saving(UNEVEN)), tmp_path)

    assert run.returncode == 0, run.output
    checkpoint = read_checkpoint(tmp_path / "mid.ckpt", tmp_path)
    # When rank 0 had computed its third batch.
    assert 3 <= checkpoint["async_amsgrad"]["version"] < 31
    assert checkpoint["global_step"] == checkpoint["async_amsgrad"]["version"] // RANKS


class Evaluated(TinyClassifier):
    """Reports the parameters that it was evaluated with."""

    logs = True

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), sync_dist=True)

    def on_test_end(self) -> None:
        report(Path.cwd(), self.global_rank, parameters=self.flat_parameters())

    def on_train_start(self) -> None:
        report(Path.cwd(), self.global_rank, parameters=self.flat_parameters(), epoch=self.current_epoch)


def assert_reported(folder: Path, path: Path) -> None:
    """All ranks had the parameters of the checkpoint at ``path``."""
    saved = torch.cat([value.reshape(-1) for value in torch.load(path)["state_dict"].values()])
    for rank in range(RANKS):
        assert torch.equal(torch.load(folder / f"rank{rank}.pt")["parameters"], saved)


@pytest.mark.compatibility("State", 'ckpt_path="best" and "last" after fit')
@pytest.mark.parametrize("start_method", ["popen", "fork"])
def test_the_best_and_the_last_checkpoint_are_found_after_fit(tmp_path: Path, start_method: Any) -> None:
    checkpoints = tmp_path / "checkpoints"

    def train() -> None:
        # The second fit finds the first one's checkpoints.
        warnings.filterwarnings("ignore", ".*exists and is not empty")
        # Training makes the loss smaller: the one with the largest is the first.
        arguments = {"monitor": "train/loss_epoch", "mode": "max", "save_top_k": -1, "save_last": True}
        callback = ModelCheckpoint(checkpoints, "{epoch}", **arguments)
        module = Evaluated(UNEVEN)
        trainer = fit(tmp_path, module, callback, max_epochs=3, start_method=start_method)
        for name, path in (("best", "epoch=0.ckpt"), ("last", "epoch=2.ckpt")):
            trainer.test(module, loader(24), ckpt_path=name)
            trainer.strategy.barrier()
            assert_reported(tmp_path, checkpoints / path)
            trainer.strategy.barrier()
        trainer = fork_trainer(
            tmp_path,
            RANKS,
            AsyncAMSGradStrategy(start_method=start_method),
            callbacks=[ModelCheckpoint(checkpoints, **arguments)],
            enable_checkpointing=True,
            max_epochs=4,
        )
        trainer.fit(Evaluated(UNEVEN), loader(124), ckpt_path="last")

    def script(folder: Path) -> None:
        run_on_every_rank(RANKS, train) if start_method == "popen" else train()

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert_reported(tmp_path, checkpoints / "epoch=2.ckpt")
    assert run.report(0)["epoch"] == 3
