"""Sets of small images: bytes in memory, augmented and normalized a batch at a time on the batch's device."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from recipes.datasets.base import Part, RecipeDataModule

__all__ = ["ImageDataModule", "ImageSet", "random_crop_and_flip"]


class ImageSet:
    """Images and their labels, as bytes.

    Args:
        images: shape (samples, channels, height, width), dtype uint8.
        labels: shape (samples,), dtype int64.

    Raises:
        ValueError: if there are not as many labels as images.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images have {len(labels)} labels")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def random_crop_and_flip(images: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Shift each image by its own random offset, and mirror half of them left to right.

    Args:
        images: shape (batch, channels, height, width).
        padding: largest shift, in pixels, in each direction. What moves in from outside is zero.
        generator: where the random numbers come from; `None` is torch's global generator.

    Returns:
        Images of the same shape and dtype.

    Examples:
        >>> images = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
        >>> random_crop_and_flip(images, 1, torch.Generator().manual_seed(0)).squeeze().tolist()
        [[4, 3, 0], [7, 6, 0], [0, 0, 0]]
    """
    count, _, height, width = images.shape
    device = None if generator is None else generator.device
    offsets = torch.randint(2 * padding + 1, (2, count), generator=generator, device=device).to(images.device)
    mirrored = (torch.rand(count, generator=generator, device=device) < 0.5).to(images.device)
    # Every crop of every image, as a view; then one crop of each.
    crops = pad(images, (padding, padding, padding, padding)).unfold(2, height, 1).unfold(3, width, 1)
    cropped = crops[torch.arange(count, device=images.device), :, offsets[0], offsets[1]]
    return torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)


class ImageDataModule(RecipeDataModule):
    """Image sets as batches of floats, normalized, and cropped and flipped at random in training.

    A subclass says with `load` what each part is, and has `mean` and `std` for pixels in [0, 1].

    Args:
        batch_size: training images in a batch of one rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        augment: shift training images by up to four pixels and mirror half of them, anew in each epoch.
        validation_samples: how many of the training images to hold out for validation; 0 validates on what the
            data set has for that purpose, or else on the test set.
        split_seed: fixes which images are held out.
        num_workers: processes that load data, per rank.
    """

    # Of shapes that broadcast with (channels, height, width).
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        augment: bool,
        validation_samples: int,
        split_seed: int,
        num_workers: int,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, validation_samples, split_seed, num_workers)
        self.augment = augment

    @abstractmethod
    def load(self, part: Part) -> ImageSet:
        """Return the images of a part.

        Args:
            part: which images.
        """

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment a training batch, and normalize any, on the device that it will be used on."""
        images, labels = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            images = random_crop_and_flip(images)
        return self.normalize(images), labels

    def normalize(self, images: Tensor) -> Tensor:
        """Return bytes as floats, less the mean and divided by the standard deviation of the data set.

        Args:
            images: shape (batch, channels, height, width), dtype uint8.
        """
        pixels = images.float().div_(255)
        return pixels.sub_(self.mean.to(pixels.device)).div_(self.std.to(pixels.device))


def per_channel(*values: float) -> Tensor:
    """Return one number for each channel, in the shape that broadcasts with images.

    Args:
        values: the numbers.
    """
    return torch.tensor(values).reshape(-1, 1, 1)
