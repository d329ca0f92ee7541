"""With a process of its own the holder outlives rank 0 for a moment, and what it has applied is not lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from lightning_async import AsyncAMSGradStrategy
from tests.integration.test_resume import (
    BATCH,
    RANKS,
    SAMPLES,
    SEED,
    TICKETS,
    Module,
    applied_tickets,
    assert_resumed_exactly,
    order_of,
)
from tests.launch import Launched, launch, processes_named
from tests.models import fork_trainer, loader
from tests.soaked import soaked

pytestmark = pytest.mark.timeout(120)

EPOCHS = 3
SNAPSHOT = Path("lightning_async") / "snapshot.ckpt"
JOB = {"LIGHTNING_ASYNC_RUN": "a name"}


def noted_in(snapshot: Path) -> dict[str, Any]:
    """What the package has noted in a snapshot."""
    noted: dict[str, Any] = torch.load(snapshot)["async_amsgrad"]
    return noted


class KillsRankZero(Callback):
    """Kills rank 0 in the middle of the second epoch, or in the validation after it, once a snapshot of it is there.

    Or where it begins, when none is.
    """

    number = signal.SIGKILL

    def __init__(self, where: str) -> None:
        self.where = where
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 1 and trainer.strategy.worker_rank == 0 and self.where == "beginning":
            self.strike()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.strategy.worker_rank or trainer.current_epoch != 1:
            return
        self.batches += 1
        if self.batches >= 4 and self.where == "training" and self.is_there(trainer):
            self.strike()

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1 and trainer.strategy.worker_rank == 0 and self.where == "validation":
            assert self.is_there(trainer)
            self.strike()

    def strike(self) -> None:
        """Does it."""
        os.kill(os.getpid(), self.number)

    def is_there(self, trainer: Any) -> bool:
        """Whether the snapshot of this segment is, for which rank 0 waits while the others go on."""
        for _ in range(1000):
            if SNAPSHOT.exists() and noted_in(SNAPSHOT)["snapshot"]["segment"] == trainer.strategy._snapshots._segment:
                return True
            time.sleep(0.005)
        return False


class KillsRankTwo(Callback):
    """Kills another rank in its third batch after it has seen the snapshot of a further epoch."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.strategy.worker_rank == 2 and trainer.current_epoch:
            time.sleep(0.01)
            self.batches += noted_in(SNAPSHOT)["epoch"] == trainer.current_epoch
            if self.batches == 3:
                os.kill(os.getpid(), signal.SIGKILL)


class KillsRankTwoAsTheyMeet(KillsRankTwo):
    """Kills it at the end of the epoch, where rank 0 waits for it in a collective."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Not here."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.strategy.worker_rank == 2 and trainer.current_epoch:
            os.kill(os.getpid(), signal.SIGKILL)


class KeepsSnapshot(Callback):
    """Keeps the snapshot that a run goes on from."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        if trainer.global_rank == 0:
            shutil.copy(SNAPSHOT, "kept.ckpt")


class ByHand(Module):
    """Optimizes by hand, and steps its schedule in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()

    def on_train_end(self) -> None:
        schedule: Any = self.lr_schedulers()
        self.began["scheduled"] = schedule.last_epoch
        super().on_train_end()


def train(folder: Path, restarts: int, callback: Callback, module: type[Module] = Module, **options: Any) -> None:
    """Fits, in the first or a further start of a job."""
    os.environ |= {**JOB, "LIGHTNING_ASYNC_RESTART_COUNT": str(restarts)}
    seed_everything(SEED, verbose=False)
    # But for one in every segment no snapshot comes due.
    strategy = AsyncAMSGradStrategy(holder="process", start_method="fork", snapshot_every_s=600.0, **options)
    trainer = fork_trainer(folder, RANKS, strategy, max_epochs=EPOCHS, callbacks=[callback])
    trainer.fit(module(), loader(SAMPLES, BATCH, shuffle=True), loader(12))


def kill_and_go_on(folder: Path, killer: Callback, **options: Any) -> tuple[Launched, int, dict[str, Any]]:
    """Returns the second start, the version of the snapshot before it, and what it went on from."""
    first = launch(lambda folder: train(folder, 0, killer, **options), folder)
    assert first.returncode == 1, first.output
    assert "failed: its process was killed by SIGKILL" in first.output
    version = noted_in(folder / SNAPSHOT)["version"]
    again = launch(lambda folder: train(folder, 1, KeepsSnapshot(), **options), folder)
    assert again.returncode == 0, again.output
    return again, version, torch.load(folder / "kept.ckpt")


def assert_each_once(again: Launched, kept: dict[str, Any]) -> None:
    """Each sample that is not of an epoch before was trained on before or after, and none twice."""
    noted = kept["async_amsgrad"]
    done = applied_tickets(noted)
    assert 0 < len(done) <= TICKETS
    rest = Counter(sample for rank in again.reports() for sample in rank["trained"])
    epochs = range(noted["epoch"] + 1, EPOCHS)
    expected = Counter((epoch, sample) for epoch in epochs for sample in range(SAMPLES))
    left = (batch for ticket, batch in enumerate(order_of(noted["epoch"])) if ticket not in done)
    expected += Counter((noted["epoch"], sample) for batch in left for sample in batch)
    assert rest == expected


OF_RANK_2 = {"of rank 2": KillsRankTwo, "of rank 2, as they meet": KillsRankTwoAsTheyMeet}


@pytest.mark.parametrize("where", soaked(["beginning", "training", "validation", *OF_RANK_2], "training", "of rank 2"))
def test_nothing_that_was_applied_is_lost_with_a_rank(tmp_path: Path, where: str) -> None:
    killer: Callback = OF_RANK_2[where]() if where in OF_RANK_2 else KillsRankZero(where)
    again, version, kept = kill_and_go_on(tmp_path, killer)

    noted = kept["async_amsgrad"]
    assert noted["epoch"] >= 1 or where == "beginning"
    assert_each_once(again, kept)
    if where not in OF_RANK_2:
        # Which may be killed when so little is left of the epoch that a rank gets none of it.
        assert_resumed_exactly(tmp_path / "kept.ckpt", again.reports(), epochs=EPOCHS)
    assert noted["version"] > version, again.output
    (told,) = re.findall(r"the holder's process was (\d+) updates further than the snapshot", again.output)
    assert int(told) == noted["version"] - version
    if where in ("beginning", "validation"):
        assert applied_tickets(noted) == [*range(-(-SAMPLES // BATCH))]
    assert {path.name for path in (tmp_path / SNAPSHOT).parent.iterdir()} == {SNAPSHOT.name}


@pytest.mark.soak
@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True, "max_staleness": 12},
        {"batches": "sharded", "transport": "tcp"},
        {"wire_dtype": "int8", "parameter_wire_dtype": "int8", "transport": "tcp"},
        {"gradients_per_update": 3, "max_staleness": 0},
        {"gradients_per_update": 2},
        {"on_stale": "drop", "max_staleness": 2},
        {"staleness_policy": "delay_adaptive"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_sample_counts_once_however_gradients_are_exchanged(tmp_path: Path, options: dict[str, Any]) -> None:
    again, version, kept = kill_and_go_on(tmp_path, KillsRankZero("training"), **options)

    assert kept["epoch"] == 1 and kept["async_amsgrad"]["version"] >= version
    assert_each_once(again, kept)


def test_a_schedule_that_is_stepped_by_hand_goes_on_where_it_was(tmp_path: Path) -> None:
    again, version, kept = kill_and_go_on(tmp_path, KillsRankZero("training"), module=ByHand)

    assert kept["async_amsgrad"]["version"] >= version + 2 * RANKS
    assert_each_once(again, kept)
    # Calls since a rank's last push are not known to the holder.
    steps = EPOCHS * TICKETS // RANKS
    scheduled = [rank["began"]["scheduled"] for rank in again.reports()]
    assert {*scheduled} <= {steps - 1, steps}, scheduled


def train_through(folder: Path, killer: Callback | None = None, **options: Any) -> None:
    """Fits in one go; rank 0 is killed in its first life."""
    seed_everything(SEED, verbose=False)
    strategy = AsyncAMSGradStrategy(
        start_method="fork", on_worker_failure="continue", **({"snapshot_every_s": 600.0} | options)
    )
    callbacks = [killer or KillsRankZeroOnce(), KeepsSnapshotOnce()]
    trainer = fork_trainer(folder, RANKS, strategy, max_epochs=EPOCHS, callbacks=callbacks)
    trainer.fit(Module(), loader(SAMPLES, BATCH, shuffle=True), loader(12))


class KillsRankZeroOnce(KillsRankZero):
    """Does so in the ranks' first start."""

    def __init__(self) -> None:
        super().__init__("training")

    def is_there(self, trainer: Any) -> bool:
        return "LIGHTNING_ASYNC_NEW_STARTS" not in os.environ and super().is_there(trainer)


class KeepsSnapshotOnce(KeepsSnapshot):
    """Does so in the second one."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        if "LIGHTNING_ASYNC_NEW_STARTS" in os.environ:
            super().on_fit_start(trainer, module)


def test_a_run_whose_ranks_are_forked_goes_on_by_itself_when_rank_0_is_killed(tmp_path: Path) -> None:
    found = launch(lambda folder: train_through(folder, holder="process"), tmp_path)

    assert found.returncode == 0, found.output
    told = "rank 0 is lost: its process was killed by SIGKILL; all ranks are started again, from the newest snapshot"
    assert f"[host 0] lightning_async: {told} (1 of 3)" in found.output
    assert "This job was restarted by its launcher and goes on from the snapshot" in found.output
    assert "Traceback" not in found.output
    assert_resumed_exactly(tmp_path / "kept.ckpt", found.reports(), epochs=EPOCHS)


class KillsHolderOnce(KillsRankZeroOnce):
    """Kills the holder's process in its place."""

    def strike(self) -> None:
        (holder,) = processes_named(os.getsid(0), "remote_main")
        os.kill(holder, signal.SIGKILL)


def test_a_run_goes_on_from_its_snapshot_when_the_holders_process_is_killed(tmp_path: Path) -> None:
    options = {"holder": "process", "snapshot_every_s": 0.05, "killer": KillsHolderOnce()}
    found = launch(lambda folder: train_through(folder, **options), tmp_path)

    assert found.returncode == 0, found.output
    told = "rank 0 is lost: its holder process was killed by SIGKILL; all ranks are started again"
    assert told in found.output
    assert_each_once(found, torch.load(tmp_path / "kept.ckpt"))


class StopsRankZeroOnce(KillsRankZeroOnce):
    """Stops it, so that nobody sees its end."""

    number = signal.SIGSTOP


@pytest.mark.soak
@pytest.mark.parametrize("holder", ["thread", "process"])
def test_a_rank_0_that_is_stopped_for_good_is_ended_and_started_again(tmp_path: Path, holder: str) -> None:
    every_s = 600.0 if holder == "process" else 0.05
    options = {"holder": holder, "worker_timeout": 2.0, "snapshot_every_s": every_s, "killer": StopsRankZeroOnce()}
    found = launch(lambda folder: train_through(folder, **options), tmp_path)

    assert found.returncode == 0, found.output
    assert "rank 0 is lost: its process did not end; all ranks are started again" in found.output
    assert_resumed_exactly(tmp_path / "kept.ckpt", found.reports(), epochs=EPOCHS)
    assert ("updates further than the snapshot" in found.output) == (holder == "process")
