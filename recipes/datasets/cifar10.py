"""CIFAR-10 in its "python version": six pickled batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.datasets.base import Part
from recipes.datasets.files import DamagedFileError, find_files
from recipes.datasets.images import ImageDataModule, ImageSet, per_channel
from recipes.datasets.pickles import load_pickle

__all__ = ["CIFAR10DataModule", "image_batch"]

HOME_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = [f"data_batch_{number}" for number in range(1, 6)]
TEST_FILE = "test_batch"


def image_batch(
    path: Path, content: dict[str, Any], first_label: int, num_classes: int
) -> tuple["np.ndarray[Any, np.dtype[np.uint8]]", "np.ndarray[Any, np.dtype[np.int64]]"]:
    """Return what a pickled batch of 32x32 colour images holds.

    Args:
        path: where it comes from, for the message.
        content: the batch; "data" has a row of 3,072 bytes for each image, channel by channel; "labels" is a list.
        first_label: the smallest label.
        num_classes: number of classes.

    Returns:
        Images, shape (samples, 3, 32, 32), and labels from 0 on, shape (samples,).

    Raises:
        DamagedFileError: if the batch holds anything else.
    """
    missing = [key for key in ("data", "labels") if key not in content]
    if missing:
        raise DamagedFileError(path, f"it has no {' and no '.join(missing)}")
    images = content["data"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise DamagedFileError(path, "its data are not rows of 3,072 bytes")
    try:
        labels = np.asarray(content["labels"], dtype=np.int64) - first_label
    except (TypeError, ValueError, OverflowError) as error:
        raise DamagedFileError(path, f"its labels are not numbers: {error}") from error
    if labels.shape != (len(images),) or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise DamagedFileError(
            path,
            f"its labels are not one number from {first_label} to {first_label + num_classes - 1} "
            f"for each of {len(images)} images",
        )
    return images.reshape(-1, 3, 32, 32), labels


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 images to train and 10,000 to test, 32x32 in colour, ten classes.

    Args:
        data_dir: folder with the batches, or with the folder cifar-10-batches-py that the archive unpacks to.
        batch_size: training images in a batch of one rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        augment: shift training images by up to four pixels and mirror half of them, anew in each epoch.
        validation_samples: how many of the training images to hold out for validation; 0 validates on the test set,
            as the paper does.
        split_seed: fixes which images are held out.
        num_workers: processes that load data, per rank.
    """

    mean = per_channel(0.4914, 0.4822, 0.4465)
    std = per_channel(0.2023, 0.1994, 0.2010)

    def __init__(
        self,
        data_dir: str = "data/cifar10",
        batch_size: int = 100,
        eval_batch_size: int = 1000,
        augment: bool = True,
        validation_samples: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, augment, validation_samples, split_seed, num_workers)
        self.data_dir = Path(data_dir)

    def prepare_data(self) -> None:
        """Look for the files, on one rank of each machine.

        Raises:
            MissingDataError: if any is missing.
        """
        self._find()

    def load(self, part: Part) -> ImageSet:
        """Read the images of a part.

        Args:
            part: "train", or the test set for both others.

        Raises:
            MissingDataError: if any of the six batches is missing.
            DamagedFileError: if a file is not what it should be.
        """
        paths = self._find()
        batches = [
            image_batch(path, load_pickle(path), first_label=0, num_classes=10)
            for path in (paths[:-1] if part == "train" else paths[-1:])
        ]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))

    def _find(self) -> list[Path]:
        folder = self.data_dir / FOLDER if (self.data_dir / FOLDER).is_dir() else self.data_dir
        return find_files("CIFAR-10 (python version)", folder, [*TRAIN_FILES, TEST_FILE], HOME_PAGE)
