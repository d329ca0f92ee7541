"""Writes small data sets in the official formats, for the tests of the readers and of the recipes."""

from __future__ import annotations

import bz2
import gzip
import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.datasets.cinic10 import CLASSES
from recipes.datasets.sparse import SparseRows

Array = np.ndarray[Any, np.dtype[Any]]


def random_bytes(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(values: Array) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(folder: Path, samples: int = 20, packed: bool = False) -> dict[str, Array]:
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Array] = {}
    for seed, prefix in enumerate(("train", "t10k")):
        files[f"{prefix}-images-idx3-ubyte"] = random_bytes(samples, 28, 28, seed=seed)
        files[f"{prefix}-labels-idx1-ubyte"] = random_bytes(samples, seed=seed + 9) % 10
    for name, values in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    return files


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what CIFAR-10's files hold."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, text: bytes) -> None:
        short = len(text) < 256
        self.write(b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text)))
        self.write(text)

    dispatch[bytes] = save_string


def python2_pickle(content: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    # Where numpy had its functions then.
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar10(folder: Path, samples: int = 4) -> dict[str, tuple[Array, list[int]]]:
    folder.mkdir(parents=True, exist_ok=True)
    batches = {}
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        images, labels = random_bytes(samples, 3072, seed=seed), [(seed + i) % 10 for i in range(samples)]
        batches[name] = (images, labels)
        (folder / name).write_bytes(python2_pickle({b"batch_label": name.encode(), b"labels": labels, b"data": images}))
    return batches


def write_imagenet32(folder: Path, samples: int = 3, mean: float = 100.0) -> dict[str, tuple[Array, list[int]]]:
    folder.mkdir(parents=True, exist_ok=True)
    batches = {}
    for seed, name in enumerate([*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data"]):
        images, labels = (
            random_bytes(samples, 3072, seed=seed),
            [1 + (7 * seed + 333 * i) % 1000 for i in range(samples)],
        )
        batches[name] = (images, labels)
        content: dict[str, Any] = {"data": images, "labels": labels}
        if name != "val_data":
            content["mean"] = np.full(3072, mean)
        with (folder / name).open("wb") as file:
            pickle.dump(content, file, protocol=4)
    return batches


def write_cinic10(folder: Path, samples: int = 1) -> dict[str, Array]:
    images = {}
    for part_seed, part in enumerate(("train", "valid", "test")):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for number in range(samples):
                pixels = random_bytes(32, 32, 3, seed=1000 * part_seed + 10 * number + label)
                Image.fromarray(pixels).save(folder / part / name / f"cifar10-{number}.png")
                images[f"{part}/{name}/{number}"] = pixels
    return images


def libsvm(rows: list[tuple[int, dict[int, float]]]) -> str:
    return "".join(
        f"{label:d} " + " ".join(f"{column}:{value:g}" for column, value in sorted(row.items())) + "\n"
        for label, row in rows
    )


def write_rcv1(folder: Path, samples: int = 24, packed: bool = False) -> dict[str, list[tuple[int, dict[int, float]]]]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    files = {}
    for name in ("rcv1_train.binary", "rcv1_test.binary"):
        rows = []
        for number in range(samples):
            columns = generator.choice(47_236, size=number % 5, replace=False) + 1
            rows.append((1 if number % 3 else -1, {int(c): float(np.round(generator.random(), 3)) for c in columns}))
        files[name] = rows
        text = libsvm(rows).encode()
        if packed:
            (folder / f"{name}.bz2").write_bytes(bz2.compress(text))
        else:
            (folder / name).write_bytes(text)
    return files


def dense(rows: SparseRows, num_features: int) -> Tensor:
    """A batch of sparse rows as an ordinary matrix."""
    lengths = torch.diff(rows.starts, append=torch.tensor([len(rows.values)], dtype=torch.int32))
    matrix = torch.zeros(len(rows.starts), num_features)
    matrix[torch.arange(len(lengths)).repeat_interleave(lengths), rows.columns.long()] = rows.values
    return matrix
