"""Claims about the batches of the recipes: parts, augmentation, generated data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.datasets import (
    CIFAR10DataModule,
    MNISTDataModule,
    SyntheticImagesDataModule,
    SyntheticSparseDataModule,
)
from recipes.datasets.images import random_crop_and_flip
from recipes.datasets.sparse import SparseRows
from tests.data_files import (
    dense,
    random_bytes,
    write_mnist,
)

# --- parts and batches -----------------------------------------------------------------------------------------------


def test_validation_samples_are_held_out_of_the_training_samples(tmp_path: Path) -> None:
    write_mnist(tmp_path, samples=30)
    data, other = (MNISTDataModule(str(tmp_path), 5, 4, validation_samples=12, split_seed=seed) for seed in (0, 1))
    data.setup("fit")
    other.setup("fit")

    def images(loader: Any) -> list[bytes]:
        return [image.numpy().tobytes() for batch in loader for image in batch[0]]

    train, val = images(data.train_dataloader()), images(data.val_dataloader())
    assert (len(train), len(val)) == (18, 12)
    assert len({*train, *val}) == 30
    assert images(other.val_dataloader()) != val


def test_holding_out_everything_is_an_error(tmp_path: Path) -> None:
    write_mnist(tmp_path, samples=30)

    with pytest.raises(ValueError, match="leaves nothing of 30"):
        MNISTDataModule(str(tmp_path), validation_samples=30).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_has_every_sample_once_with_its_own_label(num_workers: int) -> None:
    data = SyntheticSparseDataModule(
        train_samples=50, eval_samples=7, num_features=20, batch_size=8, num_workers=num_workers
    )
    data.setup("fit")
    everything = data.load("train").__getitems__(list(range(50)))

    batches = list(data.train_dataloader())

    def samples(rows: SparseRows, labels: Tensor) -> list[tuple[float, ...]]:
        return [(*row, label) for row, label in zip(dense(rows, 20).tolist(), labels.tolist(), strict=True)]

    assert [len(labels) for _, labels in batches] == [8] * 6 + [2]
    assert sorted(sample for batch in batches for sample in samples(*batch)) == sorted(samples(*everything))


@pytest.mark.parametrize("data_class", [MNISTDataModule, SyntheticImagesDataModule, SyntheticSparseDataModule])
def test_a_batch_size_of_zero_is_an_error(data_class: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        data_class(batch_size=0)


# --- augmentation ----------------------------------------------------------------------------------------------------


def crop_by_hand(image: Tensor, padding: int, down: int, right: int) -> Tensor:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding:-padding, padding:-padding] = image
    return padded[:, down : down + height, right : right + width]


def test_every_augmented_image_is_one_of_the_shifted_and_mirrored_ones() -> None:
    image = torch.from_numpy(random_bytes(3, 6, 5)) | 1
    possible = {
        shown.numpy().tobytes(): (down, right, mirrored)
        for down in range(5)
        for right in range(5)
        for mirrored, shown in enumerate((crop_by_hand(image, 2, down, right),) * 2)
        for shown in [shown.flip(2) if mirrored else shown]
    }
    assert len(possible) == 50

    augmented = random_crop_and_flip(image.expand(2000, 3, 6, 5), 2, torch.Generator().manual_seed(0))

    counts = dict.fromkeys(possible.values(), 0)
    for shown in augmented:
        counts[possible[shown.numpy().tobytes()]] += 1
    # All of them, about equally often: 40 of each are expected, and 5 standard deviations are 32.
    assert min(counts.values()) > 8
    assert max(counts.values()) < 72


def test_augmentation_is_a_function_of_the_seed() -> None:
    images = torch.from_numpy(random_bytes(16, 3, 32, 32))

    def augmented(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return random_crop_and_flip(images)

    assert torch.equal(augmented(1), augmented(1))
    assert not torch.equal(augmented(1), augmented(2))


def test_normalized_images_have_the_sets_mean_and_deviation_taken_off() -> None:
    data = CIFAR10DataModule()
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[1] = 255

    black, white = data.normalize(images)

    assert torch.allclose(black[:, 0, 0], torch.tensor([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010]))
    assert torch.allclose(white[:, 5, 7], torch.tensor([0.5086 / 0.2023, 0.5178 / 0.1994, 0.5535 / 0.2010]))
    assert images.dtype == torch.uint8 and images[1].min() == 255


# --- generated data --------------------------------------------------------------------------------------------------


def test_generated_rows_have_the_shape_of_rcv1() -> None:
    data = SyntheticSparseDataModule(train_samples=2000)

    rows, labels = data.load("train").__getitems__(list(range(2000)))

    per_row = len(rows.values) / 2000
    assert 50 < per_row < 80
    assert 0.45 < labels.float().mean() < 0.55
    assert int(rows.columns.max()) < 47_236
    assert torch.allclose(dense(rows, 47_236).norm(dim=1), torch.ones(2000), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        partial(SyntheticSparseDataModule, train_samples=40, eval_samples=40, num_features=50),
        partial(SyntheticImagesDataModule, train_samples=40, eval_samples=40),
    ],
)
def test_generated_data_are_a_function_of_the_seed_and_differ_by_part(make: Callable[..., Any]) -> None:
    def values(seed: int, part: str) -> Tensor:
        inputs, _ = make(seed=seed).load(part).__getitems__(list(range(40)))
        return dense(inputs, 50) if isinstance(inputs, SparseRows) else inputs

    assert torch.equal(values(0, "train"), values(0, "train"))
    different = [values(seed, part) for seed in (0, 1) for part in ("train", "val", "test")]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_generated_images_are_told_apart_by_their_class() -> None:
    data = SyntheticImagesDataModule(train_samples=400, eval_samples=200, noise=0.5)
    train, val = data.load("train"), data.load("val")
    assert train.images.shape == (400, 3, 32, 32) and train.images.dtype == torch.uint8

    means = torch.stack([data.normalize(train.images[train.labels == label]).mean(0) for label in range(10)])
    guessed = (data.normalize(val.images).flatten(1) @ means.flatten(1).T).argmax(1)

    assert (guessed == val.labels).float().mean() > 0.5
