"""Claims about the readers of the recipes' data sets, on small files in the official formats."""

from __future__ import annotations

import gzip
import pickle
import random
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

from recipes.datasets import (
    CIFAR10DataModule,
    CINIC10DataModule,
    DamagedFileError,
    HelpTextDataModule,
    ImageNet32DataModule,
    MissingDataError,
    MNISTDataModule,
    RCV1DataModule,
    SyntheticInteractionsDataModule,
)
from recipes.datasets.pickles import load_pickle
from recipes.datasets.text import help_text
from tests.data_files import (
    dense,
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


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    files = write_mnist(tmp_path)
    for name in files:
        (tmp_path / name).unlink()

    with pytest.raises(MissingDataError, match=f"has no {', '.join(files)} "):
        MNISTDataModule(str(tmp_path)).setup("test")


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


def test_a_pickle_with_any_bytes_changed_is_read_or_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path, samples=1)
    whole = (tmp_path / "data_batch_1").read_bytes()
    path = tmp_path / "changed"
    generator = random.Random(0)

    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        # Most of it is pixels, and any pixel will do.
        content[generator.randrange(200)] = generator.randrange(256)
        content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            load_pickle(path)
        except DamagedFileError:
            refused += 1

    assert 30 < refused < 300


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol_are_unpickled(protocol: int, tmp_path: Path) -> None:
    content = {
        "data": random_bytes(3, 5),
        b"mean": np.arange(4.0),
        "columns": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "labels": [1, 2, 1000],
    }
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=protocol))

    read = load_pickle(tmp_path / "batch")

    assert list(read) == ["data", "mean", "columns", "labels"]
    assert np.array_equal(read["data"], content["data"]) and read["data"].dtype == np.uint8
    assert np.array_equal(read["mean"], np.arange(4.0))
    assert read["columns"].tolist() == [[0, 1, 2], [3, 4, 5]]
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


def test_idx_files_begin_as_the_format_says() -> None:
    # The writer of these tests, held against the published description of the format.
    assert idx(np.zeros((60_000 // 10_000, 28, 28), np.uint8))[:16] == struct.pack(">IIII", 2051, 6, 28, 28)
    assert idx(np.zeros(6, np.uint8))[:8] == struct.pack(">II", 2049, 6)


def test_windows_of_a_text_do_not_overlap_and_their_targets_come_one_later() -> None:
    data = HelpTextDataModule(block=8, batch_size=4)
    data.setup("fit")
    windows = data.load("train")

    inputs, targets = windows.__getitems__([0, 1])

    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < data.vocabulary
    text = help_text()
    assert len(windows) + len(data.load("val")) + len(data.load("test")) >= len(text) // 8 - 3


def test_ratings_are_the_same_again_and_another_part_has_others() -> None:
    data = SyntheticInteractionsDataModule(users=20, items=10, train_samples=50, eval_samples=50)

    first, again, other = data.load("train"), data.load("train"), data.load("val")

    assert torch.equal(first.pairs, again.pairs) and torch.equal(first.liked, again.liked)
    assert not torch.equal(first.pairs, other.pairs)
    assert first.pairs.max(0).values.tolist() <= [19, 9]


@pytest.mark.parametrize(
    "make", [lambda: HelpTextDataModule(block=0), lambda: SyntheticInteractionsDataModule(users=0)]
)
def test_sizes_below_one_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make()
