"""Claims about the recipes: model, data, module, callbacks."""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from torch import nn

import lightning_async
from recipes.callbacks import EmulatedStepTime
from recipes.classifier import Batch, Classifier
from recipes.digits import DigitsDataModule, random_affine
from recipes.models import LeNet5


@pytest.fixture
def trainer_args(tmp_path: Path) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    data = DigitsDataModule()
    data.setup("fit")
    return data


def test_lenet5_has_44426_parameters_and_ten_outputs() -> None:
    model = LeNet5()

    assert sum(parameter.numel() for parameter in model.parameters()) == 44_426
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_digits_are_split_into_disjoint_parts_that_cover_all_samples(digits: DigitsDataModule) -> None:
    parts = [set(indices.tolist()) for indices in digits.indices.values()]

    assert [len(part) for part in parts] == [1261, 268, 268]
    assert len(set.union(*parts)) == 1797


def test_every_digit_is_as_frequent_in_each_part_as_in_the_whole(digits: DigitsDataModule) -> None:
    sets = (digits.train_set, digits.val_set, digits.test_set)
    counts = torch.stack([torch.bincount(part.tensors[1], minlength=10) for part in sets])
    whole = counts.sum(0)

    expected = counts.sum(1, keepdim=True) * whole / whole.sum()

    assert (counts - expected).abs().max() < 2


def test_digits_are_28x28_images_between_zero_and_one(digits: DigitsDataModule) -> None:
    images, _ = next(iter(digits.train_dataloader()))

    assert images.shape == (16, 1, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_split_is_a_function_of_its_seed(digits: DigitsDataModule) -> None:
    same, other = DigitsDataModule(split_seed=0), DigitsDataModule(split_seed=1)
    same.setup("test")
    other.setup("test")

    assert torch.equal(same.indices["test"], digits.indices["test"])
    assert not torch.equal(other.indices["test"], digits.indices["test"])


def test_the_classifiers_optimizer_is_amsgrad_unless_another_is_given() -> None:
    default = Classifier(LeNet5()).configure_optimizers()
    given = Classifier(LeNet5(), optimizer=partial(torch.optim.SGD, momentum=0.9), lr=0.1).configure_optimizers()

    assert isinstance(default, lightning_async.AMSGrad)
    assert default.param_groups[0]["lr"] == 1e-3
    assert isinstance(given, torch.optim.SGD)
    assert (given.param_groups[0]["lr"], given.param_groups[0]["momentum"]) == (0.1, 0.9)


def test_the_cosine_schedule_ends_at_zero_with_the_last_epoch(trainer_args: dict[str, Any]) -> None:
    module = Classifier(LeNet5(), lr=0.01, lr_schedule="cosine")
    trainer = Trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0, **trainer_args)

    trainer.fit(module, datamodule=DigitsDataModule())

    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_cosine_schedule_needs_a_last_epoch(trainer_args: dict[str, Any]) -> None:
    module = Classifier(LeNet5(), lr_schedule="cosine")
    trainer = Trainer(max_epochs=-1, max_steps=1, limit_val_batches=0, **trainer_args)

    with pytest.raises(MisconfigurationException, match="max_epochs"):
        trainer.fit(module, datamodule=DigitsDataModule())


def test_a_random_affine_of_size_zero_changes_nothing(digits: DigitsDataModule) -> None:
    images, _ = next(iter(digits.val_dataloader()))

    assert torch.allclose(random_affine(images, 0, 0, 0), images, atol=1e-5)
    assert not torch.allclose(random_affine(images), images, atol=1e-2)


def test_only_training_batches_are_augmented(trainer_args: dict[str, Any]) -> None:
    data = DigitsDataModule(augment=True)
    seen: dict[str, list[torch.Tensor]] = {"train": [], "val": []}

    class Recorder(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            seen["train"].append(batch[0])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen["val"].append(batch[0])
            super().validation_step(batch, batch_idx)

    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        **trainer_args,
    )
    trainer.fit(Recorder(LeNet5()), datamodule=data)

    def known(images: torch.Tensor, whole: torch.Tensor) -> bool:
        return all(bool((whole == image).flatten(1).all(1).any()) for image in images)

    assert known(seen["val"][0], data.val_set.tensors[0])
    assert not known(seen["train"][0], data.train_set.tensors[0])


def test_three_epochs_on_one_device_reach_80_percent(trainer_args: dict[str, Any]) -> None:
    seed_everything(0)
    trainer = Trainer(max_epochs=3, **trainer_args)
    module, data = Classifier(LeNet5()), DigitsDataModule()

    trainer.fit(module, datamodule=data)
    (results,) = trainer.test(module, datamodule=data, verbose=False)

    assert results["test/acc"] > 0.8


@pytest.mark.parametrize(("rank", "expected"), [(0, []), (1, [0.25]), (2, [])])
def test_emulated_step_time_sleeps_only_in_the_ranks_that_it_names(
    monkeypatch: pytest.MonkeyPatch, rank: int, expected: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    callback = EmulatedStepTime([0.0, 0.25])

    callback.on_before_backward(SimpleNamespace(global_rank=rank), nn.Identity(), torch.zeros(()))  # type: ignore[arg-type]

    assert [seconds for seconds in slept if seconds] == expected


def test_emulated_step_time_sleeps_once_in_each_training_batch(
    monkeypatch: pytest.MonkeyPatch, trainer_args: dict[str, Any]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("lightning_async.cli.demo.emulation.time.sleep", slept.append)
    trainer = Trainer(max_epochs=1, limit_train_batches=5, callbacks=[EmulatedStepTime([0.125])], **trainer_args)

    trainer.fit(Classifier(LeNet5()), datamodule=DigitsDataModule())

    assert slept.count(0.125) == 5


def test_emulated_step_time_refuses_a_negative_duration() -> None:
    with pytest.raises(ValueError, match="negative"):
        EmulatedStepTime([0.1, -0.1])
