"""A job whose ranks torchrun starts again goes on by itself: all ranks find each other, and each sample counts once."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from benchmarks.restarts import Job, kill_ranks_of
from lightning_async import AsyncAMSGradStrategy
from lightning_async.runtime.listening import reserved
from tests.integration.test_resume import BATCH, RANKS, SAMPLES, SEED, Module, assert_resumed_exactly
from tests.launch import ENVIRONMENT, launch
from tests.models import fork_trainer, loader

pytestmark = pytest.mark.timeout(240)
SNAPSHOT = Path("lightning_async") / "snapshot.ckpt"
KEPT = Path("kept.ckpt")


class Killed(Callback):
    """Kills its rank, once there is a newer snapshot than the one that this attempt has begun from."""

    def __init__(self) -> None:
        self.begun = SNAPSHOT.stat().st_mtime_ns if SNAPSHOT.exists() else 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        if SNAPSHOT.exists() and SNAPSHOT.stat().st_mtime_ns > self.begun:
            os.kill(os.getpid(), signal.SIGKILL)


class Keeps(Callback):
    """Keeps the snapshot that the fit begins from."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        if trainer.is_global_zero and SNAPSHOT.exists():
            shutil.copy(SNAPSHOT, KEPT)


def run_rank(victims: Sequence[int]) -> None:
    """A rank of an attempt, in which one of the ranks is killed if there is a victim left."""
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    seed_everything(SEED, verbose=False)
    # One after the other, as where imports take unlike times: the first finds what the attempt before has left.
    time.sleep(0.3 * rank * (attempt > 0))
    is_last = attempt == len(victims)
    epochs = torch.load(SNAPSHOT)["async_amsgrad"]["epoch"] + 2 if is_last else 1000
    callbacks = [Keeps(), *([] if is_last or rank != victims[attempt] else [Killed()])]
    strategy = AsyncAMSGradStrategy(snapshot_every_s=0.15, summary=False)
    trainer = fork_trainer(Path.cwd(), RANKS, strategy, max_epochs=epochs, callbacks=callbacks)
    trainer.fit(Module(), loader(SAMPLES, BATCH, shuffle=True), loader(12))


def torchrun(victims: Sequence[int], *where: str) -> None:
    """What the command does, but the ranks are forks of a process that has imported everything."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    options = [*where, f"--nproc-per-node={RANKS}", f"--max-restarts={len(victims)}", "--log-dir=logs", "script.py"]
    config = config_from_args(parse_args(options))[0]
    config.start_method = "fork"
    elastic_launch(config, run_rank)(victims)


@pytest.mark.parametrize("rendezvous", ["static", pytest.param("c10d", marks=pytest.mark.soak)])
def test_a_job_goes_on_from_its_snapshot_whichever_rank_was_killed(tmp_path: Path, rendezvous: str) -> None:
    with reserved(0) as port:
        where = ["--master-addr=127.0.0.1", f"--master-port={port}"] if rendezvous == "static" else ["--standalone"]
        job = launch(lambda folder: torchrun((1, 0), *where), tmp_path, timeout_s=150)

    assert job.returncode == 0, job.output
    assert job.output.count("This job was restarted by torchrun and goes on from the snapshot") == 2
    kept = tmp_path / KEPT
    assert_resumed_exactly(kept, job.reports(), epochs=torch.load(kept)["async_amsgrad"]["epoch"] + 2)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("rendezvous", "ranks", "nodes"), [("static", 4, 1), ("c10d", 3, 1), ("static", 4, 2), ("c10d", 4, 2)]
)
def test_thirty_restarts_in_a_row_go_on_at_the_first_try(
    tmp_path: Path, rendezvous: str, ranks: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real command."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    job = Job("async_amsgrad", rendezvous, str(tmp_path), ranks, nodes)

    restarts = kill_ranks_of(job, kills=30, hung_s=120.0, seed=1)

    assert [restart.tries for restart in restarts] == [1] * 30
    assert all(restart.from_step > 0 for restart in restarts)
