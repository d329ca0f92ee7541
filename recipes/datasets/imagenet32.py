"""ImageNet at 32x32 pixels: eleven pickled batches, unpacked once into a cache."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.datasets.base import Part
from recipes.datasets.cache import Chunk, cached_images, fingerprint
from recipes.datasets.cifar10 import image_batch
from recipes.datasets.files import DamagedFileError, find_files
from recipes.datasets.images import ImageDataModule, ImageSet
from recipes.datasets.pickles import load_pickle

__all__ = ["ImageNet32DataModule"]

HOME_PAGE = "https://patrykchrabaszcz.github.io/Imagenet32/"
TRAIN_FILES = [f"train_data_batch_{number}" for number in range(1, 11)]
VALIDATION_FILE = "val_data"
CLASSES = 1000


class ImageNet32DataModule(ImageDataModule):
    """Downsampled ImageNet: 1,281,167 images to train and 50,000 to validate, 32x32 in colour, 1,000 classes.

    The mean image, which comes with the training batches, is subtracted from every image.

    Args:
        data_dir: folder with train_data_batch_1 to train_data_batch_10 and val_data.
        cache_dir: where the unpacked images go, 4.1 GB; `None` is the folder "cache" in `data_dir`.
        batch_size: training images in a batch of one rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        augment: shift training images by up to four pixels and mirror half of them, anew in each epoch.
        validation_samples: how many of the training images to hold out for validation; 0 validates on val_data, which
            is also the test set.
        split_seed: fixes which images are held out.
        num_workers: processes that load data, per rank.
    """

    std = torch.ones(())

    def __init__(
        self,
        data_dir: str = "data/imagenet32",
        cache_dir: str | None = None,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        augment: bool = True,
        validation_samples: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, augment, validation_samples, split_seed, num_workers)
        self.data_dir = Path(data_dir)
        self.cache_dir = self.data_dir / "cache" if cache_dir is None else Path(cache_dir)

    def prepare_data(self) -> None:
        """Unpack what is not in the cache, on one rank of each machine."""
        self.load("train")
        self.load("test")

    def load(self, part: Part) -> ImageSet:
        """Map the images of a part into memory.

        Args:
            part: "train", or val_data for both others.

        Raises:
            MissingDataError: if any of the eleven batches is missing.
            DamagedFileError: if a file is not what it should be.
        """
        files = find_files("ImageNet-32", self.data_dir, [*TRAIN_FILES, VALIDATION_FILE], HOME_PAGE)
        name, paths = ("train", files[:-1]) if part == "train" else ("val", files[-1:])
        images = cached_images(self.cache_dir, name, fingerprint(paths), (3, 32, 32), lambda: _unpack(paths))
        self.mean = self._mean_image(files[0])
        return images

    def _mean_image(self, path: Path) -> Tensor:
        # All training batches hold the same mean image, of all training images; a row of the cache for it.
        def unpack() -> Iterator[Chunk]:
            mean = load_pickle(path).get("mean")
            if not isinstance(mean, np.ndarray) or mean.shape != (3072,) or not np.isfinite(mean.astype(float)).all():
                raise DamagedFileError(path, "its mean is not an image of 3,072 numbers")
            yield mean.astype(np.float64).reshape(1, -1).view(np.uint8), np.zeros(1, dtype=np.int64)

        row = cached_images(self.cache_dir, "mean", fingerprint([path]), (3072 * 8,), unpack).images[0]
        return row.view(torch.float64).reshape(3, 32, 32).float() / 255


def _unpack(paths: list[Path]) -> Iterator[Chunk]:
    for path in paths:
        yield image_batch(path, load_pickle(path), first_label=1, num_classes=CLASSES)
