"""MNIST and sets in its format, such as Fashion-MNIST: four idx files, plain or gzipped."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.datasets.base import Part
from recipes.datasets.files import DamagedFileError, find_files, open_binary
from recipes.datasets.images import ImageDataModule, ImageSet, per_channel

__all__ = ["MNISTDataModule", "read_idx"]

HOME_PAGE = "http://yann.lecun.com/exdb/mnist/ or https://github.com/zalandoresearch/fashion-mnist"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes.

    Its header is two zero bytes, the type of the values, the number of dimensions, and then each dimension as four
    bytes, largest first.

    Args:
        path: the file, gzipped if its name ends in .gz.

    Returns:
        The values, dtype uint8, in the file's shape.

    Raises:
        DamagedFileError: if the file is something else, or not as long as its header says.
    """
    try:
        with open_binary(path) as file:
            content = file.read()
    # Besides its own errors, gzip passes on those of zlib.
    except Exception as error:
        raise DamagedFileError(path, error) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise DamagedFileError(path, f"an idx file of unsigned bytes begins with 000008, not {content[:3].hex()}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DamagedFileError(path, "it ends within its header")
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise DamagedFileError(
            path, f"it holds {len(content) - header} values, but its header says {'x'.join(map(str, shape))}"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
    return torch.from_numpy(values.copy())


class MNISTDataModule(ImageDataModule):
    """MNIST or Fashion-MNIST: 60,000 images to train and 10,000 to test, 28x28, ten classes.

    Args:
        data_dir: folder with the four idx files, plain or gzipped.
        batch_size: training images in a batch of one rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        augment: shift training images by up to four pixels and mirror half of them; not in the paper.
        validation_samples: how many of the training images to hold out for validation; 0 validates on the test set,
            as the paper does.
        split_seed: fixes which images are held out.
        num_workers: processes that load data, per rank.
    """

    mean = per_channel(0.1307)
    std = per_channel(0.3081)

    def __init__(
        self,
        data_dir: str = "data/mnist",
        batch_size: int = 40,
        eval_batch_size: int = 1000,
        augment: bool = False,
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
            MissingDataError: if any of the four files is missing.
            DamagedFileError: if a file is not what it should be.
        """
        paths = self._find()
        image_path, label_path = paths[:2] if part == "train" else paths[2:]
        images, labels = read_idx(image_path), read_idx(label_path)
        if images.dim() != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise DamagedFileError(image_path, f"holds {list(images.shape)} instead of images of 28x28")
        if labels.shape != (len(images),) or labels.max() > 9:
            raise DamagedFileError(label_path, f"is not one label from 0 to 9 for each of {len(images)} images")
        return ImageSet(images.unsqueeze(1), labels.long())

    def _find(self) -> list[Path]:
        return find_files("MNIST", self.data_dir, FILES, HOME_PAGE, ".gz")
