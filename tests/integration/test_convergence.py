"""Asynchronous training reaches the accuracy of training on a single device in the same number of epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import ConcatDataset, DataLoader

from recipes.callbacks import EmulatedStepTime
from recipes.classifier import Classifier
from recipes.digits import DigitsDataModule
from recipes.models import LeNet5
from tests.launch import launch, report
from tests.models import fork_trainer

EPOCHS = 16
UPDATES = EPOCHS * 79


def train_and_test(folder: Path, seed: int, devices: int) -> float:
    """The accuracy on unseen digits of a LeNet-5 that one device has trained, or several asynchronously."""
    seed_everything(seed, verbose=False)
    module = Classifier(LeNet5(), lr=1e-3, lr_schedule="cosine", label_smoothing=0.1)
    data = DigitsDataModule(batch_size=16)
    # The last rank takes several times as long as the others.
    slow = EmulatedStepTime([0.0] * (devices - 1) + [0.02 if devices > 1 else 0.0])
    strategy = "async_amsgrad_fork" if devices > 1 else "auto"
    trainer = fork_trainer(folder, devices, strategy, max_epochs=EPOCHS, limit_val_batches=0, callbacks=[slow])
    trainer.fit(module, data)
    if devices > 1:
        stats = trainer.strategy.stats  # type: ignore[attr-defined]
        assert stats.updates == UPDATES
        assert sum(age * count for age, count in stats.staleness.items()) > UPDATES
    # Nothing was tuned on the validation set, and both halves together are twice as precise a test.
    data.setup("test")
    unseen = DataLoader(ConcatDataset([data.val_set, data.test_set]), batch_size=67)
    (result,) = fork_trainer(folder, 1, "auto").test(module, unseen, verbose=False)
    return float(result["test/acc"])


@pytest.mark.timeout(360)
@pytest.mark.parametrize(
    "seeds", [(0,), pytest.param((0, 1, 2), marks=pytest.mark.soak)], ids=lambda seeds: f"{len(seeds)} seeds"
)
def test_lenet5_on_four_ranks_is_as_accurate_as_on_one_device(tmp_path: Path, seeds: list[int]) -> None:
    def script(folder: Path) -> None:
        # First those whose ranks are forked: a process that has run a backward must not be forked any more.
        asynchronous = [train_and_test(folder, seed, devices=4) for seed in seeds]
        alone = [train_and_test(folder, seed, devices=1) for seed in seeds]
        report(folder, 0, asynchronous=asynchronous, alone=alone)

    run = launch(script, tmp_path, timeout_s=340.0)

    assert run.returncode == 0, run.output
    asynchronous, alone = (torch.tensor(run.report(0)[name]) for name in ("asynchronous", "alone"))
    assert alone.mean() > 0.97
    # The mean of several seeds is as precise as the difference of one per cent that it is asked about; one is not.
    assert asynchronous.mean() > alone.mean() - (0.01 if len(seeds) > 1 else 0.02)
    assert asynchronous.min() > alone.mean() - 0.02
