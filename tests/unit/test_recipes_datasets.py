"""Claims about the readers of the recipes' data sets, on small files in the official formats."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from recipes.datasets import (
    CIFAR10DataModule,
    CINIC10DataModule,
    DamagedFileError,
    ImageNet32DataModule,
    MissingDataError,
    MNISTDataModule,
    RCV1DataModule,
    SyntheticImagesDataModule,
    SyntheticSparseDataModule,
)
from recipes.datasets.files import load_pickle
from recipes.datasets.images import random_crop_and_flip
from recipes.datasets.sparse import SparseRows
from tests.data_files import (
    idx,
    libsvm,
    python2_pickle,
    random_bytes,
    write_cifar10,
    write_cinic10,
    write_imagenet32,
    write_mnist,
    write_rcv1,
)

SETS: list[Any] = [
    pytest.param(MNISTDataModule, write_mnist, "train-labels-idx1-ubyte", id="mnist"),
    pytest.param(CIFAR10DataModule, write_cifar10, "data_batch_3", id="cifar10"),
    pytest.param(CINIC10DataModule, write_cinic10, "valid/frog", id="cinic10"),
    pytest.param(ImageNet32DataModule, write_imagenet32, "train_data_batch_7", id="imagenet32"),
    pytest.param(RCV1DataModule, write_rcv1, "rcv1_test.binary", id="rcv1"),
]


def dense(rows: SparseRows, num_features: int) -> Tensor:
    lengths = torch.diff(rows.starts, append=torch.tensor([len(rows.values)], dtype=torch.int32))
    matrix = torch.zeros(len(rows.starts), num_features)
    matrix[torch.arange(len(lengths)).repeat_interleave(lengths), rows.columns.long()] = rows.values
    return matrix


# --- what is there, and what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_class", "write", "lost"), SETS)
def test_what_is_missing_is_named_with_its_home_page(
    data_class: type[LightningDataModule], write: Callable[[Path], object], lost: str, tmp_path: Path
) -> None:
    write(tmp_path)
    (tmp_path / lost).rename(tmp_path / "elsewhere")

    # Before anything is read, and only on one rank.
    with pytest.raises(MissingDataError) as error:
        data_class(data_dir=str(tmp_path)).prepare_data()

    message = str(error.value)
    assert f"{tmp_path} has no {lost}" in message
    assert "http" in message
    # Nothing that is there is called missing.
    assert message.count("_batch_") + message.count("ubyte") + message.count("/frog") <= 1


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    write_cinic10(tmp_path)
    for image in (tmp_path / "train" / "ship").iterdir():
        image.unlink()

    with pytest.raises(MissingDataError, match="train has no PNG files of ship"):
        CINIC10DataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("data_class", "write", "damaged", "content", "reason"),
    [
        (MNISTDataModule, write_mnist, "train-images-idx3-ubyte", b"\0\0\x08\x03", "header"),
        (MNISTDataModule, write_mnist, "train-images-idx3-ubyte", b"\x89PNG....", "begins with"),
        (MNISTDataModule, write_mnist, "train-images-idx3-ubyte", idx(random_bytes(20, 28, 28))[:-1], "20x28x28"),
        (MNISTDataModule, write_mnist, "train-images-idx3-ubyte", idx(random_bytes(20, 27, 28)), "28x28"),
        (MNISTDataModule, write_mnist, "train-labels-idx1-ubyte", idx(random_bytes(19) % 10), "20 images"),
        (MNISTDataModule, write_mnist, "train-labels-idx1-ubyte", idx(np.full(20, 10, np.uint8)), "0 to 9"),
        (
            partial(MNISTDataModule),
            partial(write_mnist, packed=True),
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(random_bytes(20, 28, 28)))[:-9],
            "",
        ),
        (CIFAR10DataModule, write_cifar10, "data_batch_2", b"", "damaged"),
        (CIFAR10DataModule, write_cifar10, "data_batch_2", python2_pickle([1, 2]), "instead of a dict"),
        (CIFAR10DataModule, write_cifar10, "data_batch_2", python2_pickle({b"labels": [1]}), "no data"),
        (
            CIFAR10DataModule,
            write_cifar10,
            "data_batch_2",
            python2_pickle({b"labels": [1], b"data": random_bytes(1, 3071)}),
            "3,072 bytes",
        ),
        (
            CIFAR10DataModule,
            write_cifar10,
            "data_batch_2",
            python2_pickle({b"labels": [10], b"data": random_bytes(1, 3072)}),
            "0 to 9",
        ),
        (
            ImageNet32DataModule,
            write_imagenet32,
            "train_data_batch_4",
            pickle.dumps({"data": random_bytes(2, 3072), "labels": [0, 1000], "mean": np.zeros(3072)}),
            "1 to 1000",
        ),
        (
            ImageNet32DataModule,
            write_imagenet32,
            "train_data_batch_1",
            pickle.dumps({"data": random_bytes(1, 3072), "labels": [1], "mean": np.zeros(3071)}),
            "mean",
        ),
        (CINIC10DataModule, write_cinic10, "train/cat/cifar10-0.png", b"\x89PNG\r\n\x1a\n", ""),
        (RCV1DataModule, write_rcv1, "rcv1_train.binary", b"1 3:0.5\n-1 4:x\n", ""),
        (RCV1DataModule, write_rcv1, "rcv1_train.binary", b"1 3:0.5\n2 4:1\n", "-1 or 1"),
        (RCV1DataModule, write_rcv1, "rcv1_train.binary", b"1 0:0.5\n", ""),
        (RCV1DataModule, write_rcv1, "rcv1_train.binary", b"1 47237:0.5\n", ""),
        (RCV1DataModule, write_rcv1, "rcv1_train.binary", b"1 3:nan\n", "finite"),
        (RCV1DataModule, write_rcv1, "rcv1_train.binary", b"", ""),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(
    data_class: Callable[..., LightningDataModule],
    write: Callable[[Path], object],
    damaged: str,
    content: bytes,
    reason: str,
    tmp_path: Path,
) -> None:
    write(tmp_path)
    (tmp_path / damaged).write_bytes(content)

    with pytest.raises(DamagedFileError) as error:
        data_class(data_dir=str(tmp_path)).setup("fit")

    assert str(error.value).startswith(f"{tmp_path / damaged} is damaged")
    assert reason in str(error.value)
    # It crosses from a rank's process to another by pickle.
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    write_cinic10(tmp_path)
    Image.fromarray(random_bytes(32, 33, 3)).save(tmp_path / "train" / "cat" / "wide.png")

    with pytest.raises(DamagedFileError, match=r"wide.png .* 33x32 pixels"):
        CINIC10DataModule(str(tmp_path)).setup("fit")


class Command:
    """What a hostile pickle holds: a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("key", ["data", "labels"])
def test_a_pickle_that_would_run_something_is_refused_unrun(key: str, tmp_path: Path) -> None:
    content = {"data": random_bytes(1, 3072), "labels": [1], key: Command(tmp_path / "ran")}
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=4))

    with pytest.raises(DamagedFileError, match="refuses to unpickle"):
        load_pickle(tmp_path / "batch")

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "numpy load", "numpy.core.multiarray scalar"])
def test_no_other_function_is_unpickled(name: str, tmp_path: Path) -> None:
    module, function = name.split()
    (tmp_path / "batch").write_bytes(b"\x80\x02c" + f"{module}\n{function}\n".encode() + b".")

    with pytest.raises(DamagedFileError, match=f"refuses to unpickle {module}.{function}"):
        load_pickle(tmp_path / "batch")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol_are_unpickled(protocol: int, tmp_path: Path) -> None:
    content = {"data": random_bytes(3, 5), b"mean": np.arange(4.0), "labels": [1, 2, 1000], "name": "x"}
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=protocol))

    read = load_pickle(tmp_path / "batch")

    assert list(read) == ["data", "mean", "labels", "name"]
    assert np.array_equal(read["data"], content["data"])
    assert np.array_equal(read["mean"], np.arange(4.0))
    assert read["labels"] == [1, 2, 1000]


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_as_written(packed: bool, tmp_path: Path) -> None:
    files = write_mnist(tmp_path, packed=packed)
    data = MNISTDataModule(str(tmp_path))

    for part, prefix in (("train", "train"), ("val", "t10k"), ("test", "t10k")):
        read = data.load(part)  # type: ignore[arg-type]
        assert np.array_equal(read.images.squeeze(1), files[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(read.labels, files[f"{prefix}-labels-idx1-ubyte"])


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_cifar10_is_read_as_written_from_the_folder_or_the_one_above(folder: str, tmp_path: Path) -> None:
    batches = write_cifar10(tmp_path / folder)
    data = CIFAR10DataModule(str(tmp_path))

    train, test = data.load("train"), data.load("test")

    images = np.concatenate([batches[f"data_batch_{n}"][0] for n in range(1, 6)])
    assert np.array_equal(train.images, images.reshape(20, 3, 32, 32))
    assert train.labels.tolist() == [label for n in range(1, 6) for label in batches[f"data_batch_{n}"][1]]
    assert np.array_equal(test.images.flatten(1), batches["test_batch"][0])
    assert test.labels.tolist() == batches["test_batch"][1]


def test_imagenet32_is_read_as_written_with_labels_from_zero(tmp_path: Path) -> None:
    batches = write_imagenet32(tmp_path, mean=51.0)
    data = ImageNet32DataModule(str(tmp_path), augment=False)
    data.prepare_data()
    data.setup("fit")

    train, val = data.load("train"), data.load("val")
    images, labels = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)

    assert np.array_equal(train.images[:3].flatten(1), batches["train_data_batch_1"][0])
    assert train.labels.tolist() == [n - 1 for i in range(1, 11) for n in batches[f"train_data_batch_{i}"][1]]
    assert np.array_equal(val.images.flatten(1), batches["val_data"][0])
    # Less the mean image, and nothing else.
    assert torch.allclose(images, val.images / 255 - 51 / 255, atol=1e-6)
    assert labels.tolist() == [n - 1 for n in batches["val_data"][1]]


def test_cinic10_is_read_as_written_grey_images_too(tmp_path: Path) -> None:
    images = write_cinic10(tmp_path)
    grey = random_bytes(32, 32)
    Image.fromarray(grey).save(tmp_path / "train" / "truck" / "grey.png")
    data = CINIC10DataModule(str(tmp_path), cache_dir=str(tmp_path / "decoded"))

    train, valid = data.load("train"), data.load("val")

    assert train.labels.tolist() == [*range(10), 9]
    assert np.array_equal(train.images[3].permute(1, 2, 0), images["train/cat/0"])
    assert np.array_equal(valid.images[9].permute(1, 2, 0), images["valid/truck/0"])
    assert np.array_equal(train.images[10], np.stack([grey] * 3))


@pytest.mark.parametrize("packed", [False, True])
def test_rcv1_batches_are_the_rows_as_written(packed: bool, tmp_path: Path) -> None:
    files = write_rcv1(tmp_path, packed=packed)
    data = RCV1DataModule(str(tmp_path), batch_size=8)
    chosen = [7, 0, 23, 5]

    rows, labels = data.load("train").__getitems__(chosen)

    expected = torch.zeros(4, 47_236)
    for place, index in enumerate(chosen):
        for column, value in files["rcv1_train.binary"][index][1].items():
            expected[place, column - 1] = value
    assert torch.equal(dense(rows, 47_236), expected)
    assert labels.tolist() == [int(files["rcv1_train.binary"][index][0] > 0) for index in chosen]
    assert rows.values.numel() == sum(len(files["rcv1_train.binary"][index][1]) for index in chosen)


def test_a_single_sparse_row_is_a_batch_of_one(tmp_path: Path) -> None:
    (tmp_path / "rcv1_train.binary").write_text(libsvm([(1, {2: 0.5}), (-1, {1: 1.0, 4: 2.0})]))
    (tmp_path / "rcv1_test.binary").write_text(libsvm([(1, {})]))

    rows, label = RCV1DataModule(str(tmp_path), num_features=4).load("train")[1]

    assert dense(rows, 4).tolist() == [[1.0, 0.0, 0.0, 2.0]]
    assert label == 0


# --- the cache -------------------------------------------------------------------------------------------------------


def test_images_are_decoded_once_and_again_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cinic10(tmp_path)
    opened: list[Path] = []
    open_image = Image.open

    def recording_open(path: Path, **arguments: Any) -> Any:
        opened.append(path)
        return open_image(path, **arguments)

    monkeypatch.setattr(Image, "open", recording_open)
    first = CINIC10DataModule(str(tmp_path)).load("test").images.clone()
    again = CINIC10DataModule(str(tmp_path)).load("test").images
    assert len(opened) == 10
    assert torch.equal(first, again)

    changed = random_bytes(32, 32, 3, seed=99)
    Image.fromarray(changed).save(tmp_path / "test" / "airplane" / "cifar10-0.png")
    after = CINIC10DataModule(str(tmp_path)).load("test").images

    assert len(opened) == 20
    assert np.array_equal(after[0].permute(1, 2, 0), changed)


def test_a_cache_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    write_imagenet32(tmp_path)
    images = ImageNet32DataModule(str(tmp_path)).load("train").images.clone()
    cache = tmp_path / "cache" / "train.images"
    cache.write_bytes(cache.read_bytes()[:-1])

    assert torch.equal(ImageNet32DataModule(str(tmp_path)).load("train").images, images)


def test_a_cache_survives_changes_to_the_images_in_memory(tmp_path: Path) -> None:
    write_imagenet32(tmp_path)
    images = ImageNet32DataModule(str(tmp_path)).load("val").images
    original = images.clone()
    images.zero_()

    assert torch.equal(ImageNet32DataModule(str(tmp_path)).load("val").images, original)


def test_nothing_is_left_of_a_cache_whose_source_is_damaged(tmp_path: Path) -> None:
    write_imagenet32(tmp_path)
    (tmp_path / "train_data_batch_9").write_bytes(b"")

    with pytest.raises(DamagedFileError):
        ImageNet32DataModule(str(tmp_path)).prepare_data()

    assert not list((tmp_path / "cache").iterdir())


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


def test_idx_files_begin_as_the_format_says() -> None:
    # The writer of these tests, held against the published description of the format.
    assert idx(np.zeros((60_000 // 10_000, 28, 28), np.uint8))[:16] == struct.pack(">IIII", 2051, 6, 28, 28)
    assert idx(np.zeros(6, np.uint8))[:8] == struct.pack(">II", 2049, 6)
