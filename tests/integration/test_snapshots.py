"""A run that is killed goes on from its newest snapshot, once its job is started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_async import AsyncAMSGradStrategy
from tests.integration.test_resume import BATCH, RANKS, SAMPLES, SEED, Module, assert_resumed_exactly
from tests.launch import launch, session_processes
from tests.models import fork_trainer, loader

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
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("environment", "restarted", "holder"),
    [(TORCHRUN, "TORCHELASTIC_RESTART_COUNT", "thread"), (SLURM, "SLURM_RESTART_COUNT", "process")],
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
