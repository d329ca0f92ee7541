"""While they train, ranks do not wait for one another: no collective runs between two batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from torch.distributed import distributed_c10d
from torchmetrics.classification import MulticlassAccuracy

from lightning_async import AsyncAMSGradStrategy
from lightning_async.loops.phase import Phase
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"),
    *("all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object"),
    *("monitored_barrier", "recv", "reduce", "reduce_scatter", "scatter", "scatter_object_list", "send"),
)


class CollectiveCounter:
    """Counts, by phase, the collectives that this process calls, whoever calls them."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.asynchronous: list[str] = []
        self.synchronous: list[str] = []
        for name in COLLECTIVES:
            counted = self._counted(name, getattr(distributed_c10d, name))
            for module in (dist, distributed_c10d):
                setattr(module, name, counted)

    def _counted(self, name: str, original: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            (self.asynchronous if self.phase.is_asynchronous else self.synchronous).append(name)
            return original(*args, **kwargs)

        return collective


class Talkative(TinyClassifier):
    """Logs and measures in every way that makes Lightning or torchmetrics reach for the other ranks."""

    def __init__(self, folder: Path, counter: CollectiveCounter) -> None:
        super().__init__(sleep_s=(0.005, 0.005, 0.05))
        self.accuracy = MulticlassAccuracy(2)
        self.folder = folder
        self.counter = counter
        self.asynchronous_batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.asynchronous_batches += self.counter.phase.is_asynchronous
        loss = super().training_step(batch, batch_idx)
        self.accuracy(self.net(batch[0]), batch[1])
        self.accuracy.compute()
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("synced", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_end(self) -> None:
        report(
            self.folder,
            self.global_rank,
            batches=self.batches,
            asynchronous_batches=self.asynchronous_batches,
            asynchronous=self.counter.asynchronous,
            synchronous=self.counter.synchronous,
        )


def test_no_collective_runs_between_batches_and_fast_ranks_take_more_of_them(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        trainer = fork_trainer(
            folder,
            3,
            max_epochs=2,
            enable_checkpointing=True,
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            callbacks=[
                ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=4, save_top_k=-1),
                ModelCheckpoint(folder / "best", monitor="val/loss"),
                EarlyStopping("val/loss", patience=9),
                LearningRateMonitor("step"),
                Timer({"hours": 1}),
            ],
        )
        trainer.fit(Talkative(folder, CollectiveCounter(trainer.strategy.phase)), loader(240), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ranks = run.reports()
    assert sum(rank["batches"] for rank in ranks) == 120
    assert min(ranks[0]["batches"], ranks[1]["batches"]) > 1.5 * ranks[2]["batches"]
    assert len(list(tmp_path.glob("steps/*.ckpt"))) >= 5
    for rank in ranks:
        assert rank["asynchronous_batches"] == rank["batches"]
        assert rank["synchronous"]
        assert rank["asynchronous"] == []


def test_the_counter_sees_the_collective_that_lightning_runs_before_every_batch(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

        from lightning_async.loops.epoch_loop import AsyncEpochLoop

        AsyncEpochLoop._broadcast_sigterm_tensor = _TrainingEpochLoop._broadcast_sigterm_tensor
        # Equal shares: with this broadcast in, unequal ones would leave a rank waiting.
        trainer = fork_trainer(folder, 3, AsyncAMSGradStrategy(batches="sharded", start_method="fork"))
        trainer.fit(Talkative(folder, CollectiveCounter(trainer.strategy.phase)), loader(48))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert [rank["asynchronous"] for rank in run.reports()] == [["broadcast"] * 4] * 3
