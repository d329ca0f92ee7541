"""Asynchronous training reaches the accuracy of training on a single device in the same number of epochs."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from recipes.callbacks import EmulatedStepTime
from recipes.classifier import Classifier
from recipes.digits import DigitsDataModule
from recipes.models import LeNet5
from tests.launch import launch, report
from tests.models import fork_trainer

SEEDS = (0, 1, 2)
EPOCHS = 8


def train_and_test(folder: Path, seed: int, devices: int) -> float:
    """The test accuracy of LeNet-5 on digits, trained on a single device or asynchronously on several."""
    seed_everything(seed, verbose=False)
    module = Classifier(LeNet5(), lr=2e-3, lr_schedule="cosine")
    data = DigitsDataModule(batch_size=16)
    if devices == 1:
        fork_trainer(folder, 1, "auto", max_epochs=EPOCHS, limit_val_batches=0).fit(module, data)
    else:
        # The last rank is several times slower than the others.
        slow = EmulatedStepTime([0.0] * (devices - 1) + [0.02])
        trainer = fork_trainer(folder, devices, max_epochs=EPOCHS, limit_val_batches=0, callbacks=[slow])
        trainer.fit(module, data)
        assert trainer.strategy.stats.updates == EPOCHS * 79
        print(trainer.strategy.stats.as_dict())
    (result,) = fork_trainer(folder, 1, "auto").test(module, data, verbose=False)
    return float(result["test/acc"])


def test_lenet5_on_four_ranks_is_as_accurate_as_on_one_device(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        # Ranks are forked before this process runs a backward of its own.
        asynchronous = [train_and_test(folder, seed, devices=4) for seed in SEEDS]
        alone = [train_and_test(folder, seed, devices=1) for seed in SEEDS]
        report(folder, 0, asynchronous=asynchronous, alone=alone)

    run = launch(script, tmp_path, timeout_s=110.0)

    assert run.returncode == 0, run.output
    asynchronous, alone = (torch.tensor(run.report(0)[name]) for name in ("asynchronous", "alone"))
    print(run.output, asynchronous, alone)
    assert alone.mean() > 0.95
    assert asynchronous.mean() > alone.mean() - 0.01
    assert asynchronous.min() > alone.mean() - 0.02
