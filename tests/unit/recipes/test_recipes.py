"""Claims about the recipes: model, data, module, callbacks, tables of the demo."""

import io
import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn

import lightning_async
from recipes.callbacks import EmulatedStepTime, TimeToAccuracy
from recipes.classifier import Batch, Classifier
from recipes.demo import Run, comparison_table, rank_table
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


def test_three_epochs_on_one_device_reach_80_percent_and_are_measured(
    trainer_args: dict[str, Any], tmp_path: Path
) -> None:
    seed_everything(0)
    path = tmp_path / "sub" / "results.json"
    measure = TimeToAccuracy(str(path), threshold=0.5)
    trainer = Trainer(max_epochs=3, callbacks=[measure], **trainer_args)
    module, data = Classifier(LeNet5()), DigitsDataModule()

    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)

    results = json.loads(path.read_text())
    assert results["test"]["test/acc"] > 0.8
    assert results["batches"] == 3 * 79
    assert len(results["curve"]) == 3
    first = next(seconds for seconds, accuracy in results["curve"] if accuracy >= 0.5)
    assert results["seconds_to_threshold"] == first
    assert 0 < first <= results["seconds"]
    assert results["stats"] is None


def test_a_threshold_that_is_not_reached_is_null(trainer_args: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    measure = TimeToAccuracy(str(path), threshold=1.1)
    trainer = Trainer(max_epochs=1, limit_train_batches=1, callbacks=[measure], **trainer_args)

    trainer.fit(Classifier(LeNet5()), datamodule=DigitsDataModule())

    assert json.loads(path.read_text())["seconds_to_threshold"] is None


def test_an_unknown_monitor_is_named(trainer_args: dict[str, Any], tmp_path: Path) -> None:
    measure = TimeToAccuracy(str(tmp_path / "results.json"), monitor="val/nothing")
    trainer = Trainer(max_epochs=1, limit_train_batches=1, callbacks=[measure], **trainer_args)

    with pytest.raises(KeyError, match="val/nothing"):
        trainer.fit(Classifier(LeNet5()), datamodule=DigitsDataModule())


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
    monkeypatch.setattr("recipes.callbacks.time.sleep", slept.append)
    trainer = Trainer(max_epochs=1, limit_train_batches=5, callbacks=[EmulatedStepTime([0.125])], **trainer_args)

    trainer.fit(Classifier(LeNet5()), datamodule=DigitsDataModule())

    assert slept.count(0.125) == 5


def test_emulated_step_time_refuses_a_negative_duration() -> None:
    with pytest.raises(ValueError, match="negative"):
        EmulatedStepTime([0.1, -0.1])


def test_the_rank_table_shows_share_staleness_and_waiting_of_each_rank() -> None:
    stats = {
        "batches_by_rank": {"0": 30, "1": 10},
        "staleness_by_rank": {"0": {"0": 20, "1": 10}, "1": {"3": 10}},
        "wait_seconds_by_rank": {"0": 0.5, "1": 1.25},
    }

    rows = _rows(rank_table(stats))

    assert rows == [["0", "30", "75.0%", "0.33", "1", "0.50"], ["1", "10", "25.0%", "3.00", "3", "1.25"]]


def test_the_comparison_gives_ratios_above_one_where_the_run_is_faster() -> None:
    run = Run("async", batches=100, seconds=2.0, threshold=0.95, seconds_to_threshold=1.0, test_accuracy=0.98)
    baseline = Run("ddp", batches=100, seconds=4.0, threshold=0.95, seconds_to_threshold=3.0, test_accuracy=0.97)

    rows = _rows(comparison_table(run, baseline))

    assert [row[-1] for row in rows] == ["2.00x", "3.00x", "2.00x", ""]


def test_the_comparison_says_so_where_a_run_did_not_reach_the_accuracy() -> None:
    run = Run("async", batches=10, seconds=2.0, threshold=0.95, seconds_to_threshold=1.0, test_accuracy=0.98)
    baseline = Run("ddp", batches=10, seconds=4.0, threshold=0.95, seconds_to_threshold=None, test_accuracy=0.9)

    row = _rows(comparison_table(run, baseline))[1]

    assert row[1:] == ["1.0 s", "not reached", "-"]


def _rows(table: Table) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    columns = [list(column.cells) for column in table.columns]
    return [[str(cell) for cell in row] for row in zip(*columns, strict=True)]
