"""Collectives that user code calls: refused in a batch, real where the ranks meet, and Lightning's own as before."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import Tensor
from torch.distributed import all_reduce
from torchmetrics import MeanMetric

from tests.compatibility.runs import Reporting, train
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader


class Calling(TinyClassifier):
    """Calls a collective in its training step, on ranks of unlike speed and for an odd number of batches."""

    def __init__(self, call: str) -> None:
        super().__init__(sleep_s=(0.0, 0.02))
        self.call = call

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.batches == 2:
            getattr(self, self.call)(loss.detach().clone())
        return loss

    def of_torch(self, loss: Tensor) -> None:
        all_reduce(loss)

    def of_objects(self, loss: Tensor) -> None:
        dist.all_gather_object([None, None], loss)

    def barrier(self, loss: Tensor) -> None:
        self.trainer.strategy.barrier()

    def broadcast(self, loss: Tensor) -> None:
        self.trainer.strategy.broadcast(loss)

    def reduce(self, loss: Tensor) -> None:
        self.trainer.strategy.reduce(loss)

    def decide(self, loss: Tensor) -> None:
        self.trainer.strategy.reduce_boolean_decision(True)

    def gather(self, loss: Tensor) -> None:
        self.all_gather(loss)


def refused(folder: Path, call: str) -> Launched:
    def script(folder: Path) -> None:
        fork_trainer(folder, 2).fit(Calling(call), loader(60))

    run = launch(script, folder)
    assert run.returncode != 0
    return run


@pytest.mark.compatibility(
    "Refused",
    "`torch.distributed` in a batch",
    "refused",
    "No two ranks are at the same batch. Call it in validation or at the end of the epoch.",
)
@pytest.mark.parametrize(("call", "name"), [("of_torch", "all_reduce"), ("of_objects", "all_gather_object")])
def test_a_collective_of_torchs_in_a_training_step_ends_in_an_error(tmp_path: Path, call: str, name: str) -> None:
    run = refused(tmp_path, call)

    assert f"torch.distributed.{name} ({__file__}:" in run.output
    assert "was called while the ranks train asynchronously" in run.output


@pytest.mark.compatibility(
    "Refused",
    "`trainer.strategy.barrier`, `broadcast`, `reduce` and `reduce_boolean_decision` in a batch",
    "refused",
    "As those of torch.distributed. Lightning's own calls in a batch (logging, Timer, ModelCheckpoint) are local.",
)
@pytest.mark.compatibility(
    "Refused",
    "`all_gather` in `training_step`",
    "refused",
    "No two ranks are at the same batch. Call it in validation or at the end of the epoch.",
)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("barrier", "trainer.strategy.barrier"),
        ("broadcast", "trainer.strategy.broadcast"),
        ("reduce", "trainer.strategy.reduce"),
        ("decide", "trainer.strategy.reduce_boolean_decision"),
        ("gather", "all_gather"),
    ],
)
def test_a_collective_of_the_strategys_in_a_training_step_ends_in_an_error(
    tmp_path: Path, call: str, name: str
) -> None:
    run = refused(tmp_path, call)

    assert f"{name} was called while the ranks train asynchronously" in run.output
    assert "Call it in validation or at the end of the epoch" in run.output


class Saving(ModelCheckpoint):
    """A user's subclass, whose super() runs Lightning's collectives in a batch."""

    saved = 0

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.saved += 1


class Logging(Reporting):
    logs = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("epoch", float(self.global_rank), on_step=False, on_epoch=True, sync_dist=True)
        return loss


@pytest.mark.compatibility("Tools", "subclasses of ModelCheckpoint that call `super()`")
def test_lightnings_own_collectives_in_a_batch_stay_local(tmp_path: Path) -> None:
    train(
        tmp_path,
        Logging,
        callbacks=[
            Timer(duration=timedelta(hours=1)),
            Saving(tmp_path / "by_time", train_time_interval=timedelta(milliseconds=5), save_top_k=-1),
            Saving(
                tmp_path / "by_step",
                every_n_train_steps=2,
                save_top_k=2,
                monitor="train/loss",
                enable_version_counter=True,
            ),
        ],
        enable_checkpointing=True,
        max_epochs=2,
    )

    assert list((tmp_path / "by_step").glob("*.ckpt"))


class Meeting(Reporting):
    """Calls collectives of its own in the hooks where all ranks meet."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []
        self.given: list[Any] = []

    def together(self) -> None:
        mine = torch.tensor(float(self.global_rank + 1))
        dist.all_reduce(mine)
        self.sums.append(mine.item())
        self.given.append(self.trainer.strategy.broadcast(f"from {self.global_rank}"))
        self.sums.append(float(self.trainer.strategy.reduce(torch.tensor(self.global_rank + 1.0), reduce_op="sum")))
        self.trainer.strategy.barrier()

    def on_train_start(self) -> None:
        self.together()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.together()

    def on_validation_epoch_end(self) -> None:
        self.together()

    def on_train_epoch_end(self) -> None:
        self.together()

    def facts(self) -> dict[str, Any]:
        return {"sums": self.sums, "given": self.given}


@pytest.mark.compatibility("Loop", "collectives of user code in hooks where all ranks meet")
def test_collectives_of_user_code_are_real_where_the_ranks_meet(tmp_path: Path) -> None:
    run = train(tmp_path, Meeting, validation_samples=12, max_epochs=2)

    for rank in run.reports():
        assert rank["given"] == ["from 0"] * 7
        assert rank["sums"] == [6.0] * 14


class Stepwise(TinyClassifier):
    def __init__(self) -> None:
        super().__init__(sleep_s=(0.0, 0.01))
        self.metric = MeanMetric(dist_sync_on_step=True)
        self.off = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean = batch[2].float().mean()
        self.off += int(self.metric(mean) != mean)
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        report(Path.cwd(), self.global_rank, off=self.off, batches=self.batches)


@pytest.mark.compatibility(
    "Tools",
    "torchmetrics with `dist_sync_on_step=True`",
    "differs",
    "The value of a step is this rank's, with one warning; what is computed at the epoch's end is all ranks'.",
)
def test_a_metric_that_would_synchronise_each_step_is_local_with_a_warning(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        # pytest would keep it.
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: print(message)  # type: ignore[assignment]
        fork_trainer(folder, 2).fit(Stepwise(), loader(60))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert [rank["off"] for rank in run.reports()] == [0, 0]
    assert sum(rank["batches"] for rank in run.reports()) == 15
    assert run.output.count("dist_sync_on_step=True") == 1
