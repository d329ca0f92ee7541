"""Generated data in the shapes of the real sets: nothing to download, the same on every rank, and learnable."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from recipes.datasets.base import Part
from recipes.datasets.images import ImageDataModule, ImageSet, per_channel
from recipes.datasets.sparse import RCV1_FEATURES, SparseDataModule, SparseSet

__all__ = ["SyntheticImagesDataModule", "SyntheticSparseDataModule"]

PARTS: tuple[Part, ...] = ("train", "val", "test")


class SyntheticImagesDataModule(ImageDataModule):
    """Images in the shape of CINIC-10's: a pattern for each class, at random contrast and place, under noise.

    Args:
        train_samples: number of training images.
        eval_samples: number of images to validate, and again to test.
        num_classes: number of classes.
        noise: standard deviation of the noise, where the patterns' is 1 at full contrast.
        seed: fixes all images.
        batch_size: training images in a batch of one rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        augment: shift training images by up to four pixels and mirror half of them, anew in each epoch.
        num_workers: processes that load data, per rank.

    Raises:
        ValueError: if a number of samples or classes is less than 1, or the noise is negative.
    """

    mean = per_channel(0.5, 0.5, 0.5)
    std = per_channel(0.25, 0.25, 0.25)

    def __init__(
        self,
        train_samples: int = 10_000,
        eval_samples: int = 2_000,
        num_classes: int = 10,
        noise: float = 1.0,
        seed: int = 0,
        batch_size: int = 80,
        eval_batch_size: int = 500,
        augment: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, augment, 0, 0, num_workers)
        if min(train_samples, eval_samples, num_classes) < 1 or noise < 0:
            raise ValueError(
                "train_samples, eval_samples and num_classes are at least 1 and noise is not negative, "
                f"got {train_samples}, {eval_samples}, {num_classes} and {noise}"
            )
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.num_classes = num_classes
        self.noise = noise
        self.seed = seed

    def load(self, part: Part) -> ImageSet:
        """Generate the images of a part.

        Args:
            part: which images.
        """
        common, own = generators(self.seed, part)
        patterns = interpolate(torch.randn(self.num_classes, 3, 8, 8, generator=common), size=40, mode="bilinear")
        patterns = patterns / patterns.std(dim=(1, 2, 3), keepdim=True)
        count = self.train_samples if part == "train" else self.eval_samples
        labels = torch.randint(self.num_classes, (count,), generator=own)
        # Each image shows 32x32 pixels of its pattern's 40x40.
        places = torch.randint(9, (2, count), generator=own)
        contrast = torch.rand(count, 1, 1, 1, generator=own) + 0.5
        windows = patterns.unfold(2, 32, 1).unfold(3, 32, 1)
        images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
        for start in range(0, count, 1_000):
            some = slice(start, start + 1_000)
            shown = windows[labels[some], :, places[0, some], places[1, some]] * contrast[some]
            shown += self.noise * torch.randn(shown.shape, generator=own)
            images[some] = (shown * 40 + 127.5).clamp(0, 255).to(torch.uint8)
        return ImageSet(images, labels)


class SyntheticSparseDataModule(SparseDataModule):
    """Sparse rows in the shape of rcv1's: few frequent columns and many rare ones, and rows of length 1.

    Columns with odd numbers are commoner in rows of class 1, those with even numbers in rows of class 0.

    Args:
        train_samples: number of training rows.
        eval_samples: number of rows to validate, and again to test.
        num_features: number of columns, at least 2.
        draws_per_row: how many times a column is drawn for a row; some are drawn more than once.
        affinity: how much a column says about the class, from 0 (nothing) to 1 (everything).
        wrong_labels: share of labels that are turned over, from 0 to 0.5.
        seed: fixes all rows.
        batch_size: training rows in a batch of one rank.
        eval_batch_size: rows in a batch of validation, test and prediction.
        num_workers: processes that load data, per rank.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        train_samples: int = 20_242,
        eval_samples: int = 5_000,
        num_features: int = RCV1_FEATURES,
        draws_per_row: int = 80,
        affinity: float = 0.3,
        wrong_labels: float = 0.02,
        seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, 0, 0, num_workers)
        if min(train_samples, eval_samples, num_features - 1, draws_per_row) < 1:
            raise ValueError(
                "train_samples, eval_samples and draws_per_row are at least 1 and num_features at least 2, "
                f"got {train_samples}, {eval_samples}, {draws_per_row} and {num_features}"
            )
        if not 0 <= affinity <= 1 or not 0 <= wrong_labels <= 0.5:
            raise ValueError(
                f"affinity is from 0 to 1 and wrong_labels from 0 to 0.5, got {affinity} and {wrong_labels}"
            )
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.num_features = num_features
        self.draws_per_row = draws_per_row
        self.affinity = affinity
        self.wrong_labels = wrong_labels
        self.seed = seed

    def load(self, part: Part) -> SparseSet:
        """Generate the rows of a part.

        Args:
            part: which rows.
        """
        _, own = generators(self.seed, part)
        count = self.train_samples if part == "train" else self.eval_samples
        classes = torch.randint(2, (count,), generator=own)
        bounds, columns, values = self._rows(self._draw_columns(classes, own))
        wrong = torch.rand(count, generator=own) < self.wrong_labels
        return SparseSet(bounds, columns.int(), values, classes ^ wrong)

    def _draw_columns(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        size = (len(classes), self.draws_per_row)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        # Like words of a text: column c is drawn about 1/(c + 1) as often as the first.
        drawn = ((self.num_features + 1.0) ** uniform - 1).long()
        agrees = torch.rand(size, generator=generator) < (1 + self.affinity) / 2
        odd = torch.where(agrees, classes.unsqueeze(1), 1 - classes.unsqueeze(1))
        return (drawn // 2 * 2 + odd).clamp_(max=self.num_features - 1)

    def _rows(self, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = len(drawn)
        # Row and column as one number, so that equal ones can be counted, in order.
        numbers = torch.arange(count).unsqueeze(1) * self.num_features + drawn
        places, times = torch.unique_consecutive(numbers.reshape(-1).sort().values, return_counts=True)
        rows, columns = places // self.num_features, places % self.num_features
        # tf-idf: what is in almost every row counts for little.
        rows_with = torch.bincount(columns, minlength=self.num_features)
        values = torch.log1p(times.float()) * torch.log((count + 1) / rows_with[columns])
        lengths = torch.zeros(count).index_add_(0, rows, values**2).sqrt()
        bounds = torch.zeros(count + 1, dtype=torch.long)
        bounds[1:] = torch.bincount(rows, minlength=count).cumsum(0)
        return bounds, columns, values / lengths[rows]


def generators(seed: int, part: Part) -> tuple[torch.Generator, torch.Generator]:
    """Return one generator for what all parts share, and one of the part's own.

    Args:
        seed: the seed of the data set.
        part: the part.
    """
    return (
        torch.Generator().manual_seed(seed),
        torch.Generator().manual_seed(seed * len(PARTS) + PARTS.index(part) + 1),
    )
