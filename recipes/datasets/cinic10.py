"""CINIC-10: folders of PNG files, decoded once into a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_async.cli.requirements import require
from recipes.datasets.base import Part
from recipes.datasets.cache import Chunk, cached_images, fingerprint
from recipes.datasets.files import DamagedFileError, MissingDataError, find_files
from recipes.datasets.images import ImageDataModule, ImageSet, per_channel

__all__ = ["CLASSES", "CINIC10DataModule"]

HOME_PAGE = "https://github.com/BayesWatch/cinic-10"
FOLDERS: dict[Part, str] = {"train": "train", "val": "valid", "test": "test"}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHUNK_IMAGES = 5_000


class CINIC10DataModule(ImageDataModule):
    """CINIC-10: 90,000 images each to train, to validate and to test, 32x32 in colour, ten classes.

    Args:
        data_dir: folder with train, valid and test, each with a folder of PNG files for each class.
        cache_dir: where the decoded images go, 276 MB for each part; `None` is the folder "cache" in `data_dir`.
        batch_size: training images in a batch of one rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        augment: shift training images by up to four pixels and mirror half of them, anew in each epoch.
        validation_samples: how many of the training images to hold out for validation; 0 validates on the data
            set's own validation images.
        split_seed: fixes which images are held out.
        num_workers: processes that load data, per rank.

    Raises:
        ModuleNotFoundError: if Pillow, which reads the files, is not installed and there is no cache yet.
    """

    mean = per_channel(0.47889522, 0.47227842, 0.43047404)
    std = per_channel(0.24205776, 0.23828046, 0.25874835)

    def __init__(
        self,
        data_dir: str = "data/cinic10",
        cache_dir: str | None = None,
        batch_size: int = 80,
        eval_batch_size: int = 500,
        augment: bool = True,
        validation_samples: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, augment, validation_samples, split_seed, num_workers)
        self.data_dir = Path(data_dir)
        self.cache_dir = self.data_dir / "cache" if cache_dir is None else Path(cache_dir)
        if not self.cache_dir.exists():
            require("PIL", "pillow", "PNG files are read with Pillow")

    def prepare_data(self) -> None:
        """Decode what is not in the cache, on one rank of each machine."""
        for part in FOLDERS:
            self.load(part)

    def load(self, part: Part) -> ImageSet:
        """Map the images of a part into memory.

        Args:
            part: which images.

        Raises:
            MissingDataError: if a part's or a class's folder is missing or without a PNG file.
            DamagedFileError: if a PNG file is not what it should be.
        """
        wanted = [f"{folder}/{name}" for folder in FOLDERS.values() for name in CLASSES]
        folders = find_files("CINIC-10", self.data_dir, wanted, HOME_PAGE)
        first = list(FOLDERS).index(part) * len(CLASSES)
        by_class = [sorted(folder.glob("*.png")) for folder in folders[first : first + len(CLASSES)]]
        empty = [name for name, images in zip(CLASSES, by_class, strict=True) if not images]
        if empty:
            raise MissingDataError(
                f"CINIC-10: {self.data_dir / FOLDERS[part]} has no PNG files of {', '.join(empty)}. "
                f"Get the data set from {HOME_PAGE}."
            )
        files = [(path, label) for label, images in enumerate(by_class) for path in images]
        source = fingerprint([path for path, _ in files])
        return cached_images(self.cache_dir, FOLDERS[part], source, (3, 32, 32), lambda: _decode(files))


def _decode(files: list[tuple[Path, int]]) -> Iterator[Chunk]:
    for start in range(0, len(files), CHUNK_IMAGES):
        chunk = files[start : start + CHUNK_IMAGES]
        pixels = np.stack([_read_png(path) for path, _ in chunk])
        yield pixels.transpose(0, 3, 1, 2), np.array([label for _, label in chunk], dtype=np.int64)


def _read_png(path: Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != (32, 32):
                raise ValueError(f"it is {image.width}x{image.height} pixels instead of 32x32")
            # Some of the images are grey.
            return np.asarray(image.convert("RGB"))
    # A damaged PNG may be an OSError, a SyntaxError or a zlib.error.
    except Exception as error:
        raise DamagedFileError(path, error) from error
