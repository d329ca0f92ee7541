"""An older snapshot that is brought up to date is what a new one would have been."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from lightning_async import AMSGrad, AsyncStrategy
from lightning_async.exchange.last_state import LastState, LastStateFile
from lightning_async.strategies.just_in_time import bring_up_to_date
from tests.compatibility.test_manual import SmallGAN
from tests.harness import eventually
from tests.integration.test_snapshots import SNAPSHOT, differences
from tests.launch import launch
from tests.models import TinyClassifier, fork_trainer, loader

# What is of when the old one was taken, and what a resumed run catches up by itself.
RANK_ZEROS = (".loops", ".callbacks", ".averaging", ".lr_schedulers")


class TakesBoth(Callback):
    """Takes a snapshot after the third batch, and after the eighth what a holder's process would leave, and another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.batches in (3, 8):
            # It was taken between the two batches.
            assert eventually(lambda: trainer.strategy._snapshots.written == 1 + self.batches // 8)
            shutil.copy(self.folder / SNAPSHOT, self.folder / f"{self.batches}.ckpt")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.batches += 1
        if self.batches in (3, 8):
            trainer.strategy._snapshots._next = 0.0
        if self.batches == 8:
            trainer.strategy._signals.saves.append(lambda: self.leave(trainer))
        trainer.should_stop = self.batches == 9

    def leave(self, trainer: Any) -> None:
        engine = trainer.strategy.engine
        snapshot = engine.snapshot()
        views = [engine.layout.views(snapshot.parameters, index) for index in range(len(engine.optimizers))]
        LastStateFile(self.folder / SNAPSHOT).write([LastState.of("", snapshot, views)])


class Unlike(TinyClassifier):
    """Has a frozen layer, tied weights, rounded parameters, and two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.tied = nn.ModuleList([self.net])
        self.to(torch.bfloat16)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0].bfloat16(), *batch[1:]], batch_idx)

    def configure_optimizers(self) -> Any:
        first, *rest = self.net.parameters()
        groups = [{"params": [*self.frozen.parameters(), first]}, {"params": rest, "lr": 1e-3}]
        return AMSGrad(groups, lr=1e-2, weight_decay=0.1)


class Clones(Callback):
    """Leaves something else in the place of the parameters."""

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value.half() for name, value in checkpoint["state_dict"].items()}


def train(folder: Path, module: Any, options: dict[str, Any], callbacks: list[Any]) -> None:
    warnings.simplefilter("ignore")
    strategy = AsyncStrategy(start_method="fork", snapshot_every_s=3600.0, summary=False, **options)
    callbacks = [*(each() for each in callbacks), TakesBoth(folder)]
    fork_trainer(folder, 1, strategy, callbacks=callbacks, max_epochs=1).fit(module(), loader(160))


@pytest.mark.parametrize(
    ("module", "options", "callbacks"),
    [
        (TinyClassifier, {"gradients_per_update": 3}, []),
        (TinyClassifier, {"staleness_policy": "delay_adaptive"}, [EMAWeightAveraging]),
        (Unlike, {}, []),
        (SmallGAN, {}, []),
    ],
    ids=["several gradients", "policy, EMA", "frozen, tied, rounded, groups", "several optimizers by hand"],
)
def test_an_old_snapshot_with_the_last_state_is_a_new_one(
    tmp_path: Path, module: Any, options: dict[str, Any], callbacks: list[Any]
) -> None:
    run = launch(lambda folder: train(folder, module, options, callbacks), tmp_path)
    assert run.returncode == 0, run.output
    old, new = (torch.load(tmp_path / f"{batches}.ckpt", weights_only=False) for batches in (3, 8))
    last = LastStateFile(tmp_path / SNAPSHOT).read("")
    assert last is not None

    noted = old["async_amsgrad"]
    note = noted["snapshot"]
    bring_up_to_date(old, noted, last, note["places"], note["counts_steps"])

    # Lightning's own, and the callbacks', are of when it was taken.
    unlike = [place for place in differences(old, new) if not place.startswith(RANK_ZEROS)]
    averages = [place for place in unlike if callbacks and place.startswith(".state_dict")]
    clocks = [f".async_amsgrad.{name}" for name in ("clock", "snapshot.written", "snapshot.step")]
    assert {*unlike} <= {*averages, *clocks}, unlike
    assert old["async_amsgrad"]["version"] >= 2


def test_parameters_that_a_hook_has_replaced_are_not_guessed(tmp_path: Path) -> None:
    run = launch(lambda folder: train(folder, TinyClassifier, {}, [Clones]), tmp_path)
    assert run.returncode == 0, run.output
    old = torch.load(tmp_path / "3.ckpt", weights_only=False)
    last = LastStateFile(tmp_path / SNAPSHOT).read("")
    assert last is not None

    noted = old["async_amsgrad"]
    note = noted["snapshot"]
    with pytest.raises(ValueError, match="has put something else in the parameters' place"):
        bring_up_to_date(old, noted, last, note["places"], note["counts_steps"])
