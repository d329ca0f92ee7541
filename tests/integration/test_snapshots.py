"""A run that is killed goes on from its newest snapshot, once its job is started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging

from lightning_async import AsyncAMSGradStrategy, AsyncStrategy
from lightning_async.loops.epoch_loop import AsyncEpochLoop
from tests.compatibility.test_manual import SmallGAN
from tests.harness import eventually
from tests.integration.test_resume import (
    BATCH,
    RANKS,
    SAMPLES,
    SEED,
    TICKETS,
    Module,
    applied_tickets,
    assert_resumed_exactly,
)
from tests.launch import launch, session_processes
from tests.models import TinyClassifier, fork_trainer, loader

SNAPSHOT = Path("lightning_async") / "snapshot.ckpt"
# As torchrun and SLURM tell it.
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_ERROR_FILE": "/logs/torchelastic_1/none_1/attempt_0/0/error.json",
}
SLURM = {"SLURM_JOB_ID": "17"}


def train(folder: Path, environment: dict[str, str], options: dict[str, Any], max_epochs: int = 3) -> None:
    """Fits in a job that Lightning is not told of: it would ask torchrun or SLURM for the ranks."""
    seed_everything(SEED, verbose=False)
    strategy = AsyncAMSGradStrategy(start_method="fork", **({"snapshot_every_s": 0.15} | options))
    trainer = fork_trainer(folder, RANKS, strategy, max_epochs=max_epochs)
    os.environ |= environment
    trainer.fit(Module(), loader(SAMPLES, BATCH, shuffle=True), loader(12))


def kill_all(session: int, path: Path, after_s: float) -> None:
    """Kills every process of a run some time after its first snapshot."""
    deadline = time.monotonic() + 40
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after_s)
    while processes := session_processes(session):
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("environment", "restarted", "holder"),
    [
        (TORCHRUN, "TORCHELASTIC_RESTART_COUNT", "thread"),
        pytest.param(SLURM, "SLURM_RESTART_COUNT", "process", marks=pytest.mark.soak),
    ],
    ids=["torchrun", "SLURM, holder apart"],
)
def test_a_killed_run_goes_on_from_its_snapshot_with_every_sample_once(
    tmp_path: Path, environment: dict[str, str], restarted: str, holder: str
) -> None:
    path, moment = tmp_path / SNAPSHOT, random.Random(os.getpid()).uniform(0, 0.4)
    options = {"holder": holder}
    first = launch(
        lambda folder: train(folder, environment, options, max_epochs=50),
        tmp_path,
        meanwhile=lambda session: kill_all(session, path, moment),
    )
    kept = Path(shutil.copy(path, tmp_path / "kept.ckpt"))
    noted = torch.load(kept)["async_amsgrad"]
    again = launch(
        lambda folder: train(folder, environment | {restarted: "1"}, options, max_epochs=noted["epoch"] + 2), tmp_path
    )

    assert first.returncode == -signal.SIGKILL
    assert again.returncode == 0, again.output
    assert_resumed_exactly(kept, again.reports(), epochs=noted["epoch"] + 2)


class EndsInSecondFit(Callback):
    """Kills rank 0 in the middle of the script's second fit, once that has a snapshot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.worker_rank == 0 and batch_idx == 5 and trainer.current_epoch == 1:
            assert eventually(lambda: trainer.strategy._snapshots.written > 0)
            os.kill(os.getpid(), signal.SIGKILL)


def fit_twice(folder: Path, variables: dict[str, str], kills: bool) -> None:
    os.environ |= SLURM | variables
    for number in (1, 2):
        strategy = AsyncAMSGradStrategy(start_method="fork", snapshot_every_s=0.05, summary=False)
        callbacks = [EndsInSecondFit(folder)] if kills and number == 2 else []
        trainer = fork_trainer(folder, 2, strategy, max_epochs=number, callbacks=callbacks)
        trainer.fit(Module(), loader(SAMPLES, BATCH, shuffle=True))
        print(f"fit {number} has ended at step {trainer.global_step}")


def test_a_script_that_fits_twice_goes_on_in_the_fit_that_a_snapshot_is_of(tmp_path: Path) -> None:
    """Forked ranks cannot count the script's fits: each is the first of its process."""
    first = launch(lambda folder: fit_twice(folder, {}, kills=True), tmp_path)
    again = launch(lambda folder: fit_twice(folder, {"SLURM_RESTART_COUNT": "1"}, kills=False), tmp_path)

    assert first.returncode != 0
    assert "fit 1 has ended" in first.output
    assert again.returncode == 0, again.output
    folder = (tmp_path / SNAPSHOT).parent
    assert {found.name for found in folder.iterdir()} == {"snapshot.ckpt", "snapshot.fit2.ckpt"}
    for place in ("snapshot.ckpt: epoch 0, step", "snapshot.fit2.ckpt: epoch 1, step"):
        assert f"goes on from the snapshot {folder}/{place}" in again.output
    assert "fit 1 has ended" in again.output and "fit 2 has ended" in again.output


def test_a_run_goes_on_from_a_snapshot_of_a_whole_epoch_that_was_not_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_due = AsyncEpochLoop._save_due

    def when_all_is_applied(loop: Any) -> None:
        loop.trainer.strategy._snapshots._next = 0.0
        save_due(loop)

    monkeypatch.setattr(AsyncEpochLoop, "_save_due", when_all_is_applied)
    first = launch(lambda folder: train(folder, SLURM, {"snapshot_every_s": 60.0}, max_epochs=1), tmp_path)
    kept = Path(shutil.copy(tmp_path / SNAPSHOT, tmp_path / "kept.ckpt"))
    again = launch(lambda folder: train(folder, SLURM | {"SLURM_RESTART_COUNT": "1"}, {}, max_epochs=2), tmp_path)

    assert first.returncode == 0, first.output
    assert again.returncode == 0, again.output
    assert applied_tickets(torch.load(kept)["async_amsgrad"]) == [*range(TICKETS)]
    assert_resumed_exactly(kept, again.reports(), epochs=2)


class SavesBesideASnapshot(Callback):
    """Saves an ordinary checkpoint at the moment of the only snapshot, from user code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.batches += 1
        if self.batches == 3:
            # It is made between two batches, just before a snapshot that is due.
            trainer.strategy._signals.saves.append(lambda: trainer.save_checkpoint(self.folder / "ordinary.ckpt"))
            trainer.strategy._snapshots._next = 0.0
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, module: Any) -> None:
        assert eventually(lambda: trainer.strategy._snapshots.written == 1)


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    if isinstance(one, dict):
        unlike = [f"{place}.{key}" for key in one.keys() ^ other.keys()]
        return unlike + [
            each for key in one.keys() & other.keys() for each in differences(one[key], other[key], f"{place}.{key}")
        ]
    if isinstance(one, (list, tuple)):
        unlike = [] if len(one) == len(other) else [place]
        return unlike + [
            each
            for at, pair in enumerate(zip(one, other, strict=False))
            for each in differences(*pair, f"{place}.{at}")
        ]
    return [] if one == other else [place]


def averages() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(1e-3, swa_epoch_start=1)


@pytest.mark.parametrize(
    ("module", "options", "callbacks"),
    [
        (TinyClassifier, {"gradients_per_update": 3}, [EMAWeightAveraging]),
        (TinyClassifier, {"staleness_policy": "delay_adaptive"}, [averages]),
        (SmallGAN, {}, []),
    ],
    ids=["several gradients, EMA", "policy, SWA", "several optimizers by hand"],
)
def test_a_snapshot_is_what_save_checkpoint_writes(
    tmp_path: Path, module: Any, options: dict[str, Any], callbacks: list[Any]
) -> None:
    def script(folder: Path) -> None:
        warnings.simplefilter("ignore")
        strategy = AsyncStrategy(start_method="fork", snapshot_every_s=3600.0, summary=False, **options)
        callbacks_here = [*(each() for each in callbacks), SavesBesideASnapshot(folder)]
        fork_trainer(folder, 1, strategy, callbacks=callbacks_here, max_epochs=5).fit(module(), loader(160))

    run = launch(script, tmp_path)
    ordinary = torch.load(tmp_path / "ordinary.ckpt", weights_only=False)
    snapshot = torch.load(tmp_path / SNAPSHOT, weights_only=False)
    note = snapshot["async_amsgrad"].pop("snapshot")

    assert run.returncode == 0, run.output
    assert differences(ordinary, snapshot) == []
    assert note["epoch"] == snapshot["epoch"]
