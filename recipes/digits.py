"""Handwritten digits that need no download: scikit-learn's bundled set of 1,797 images."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["EVALUATION_SAMPLES", "DigitsDataModule", "random_affine"]

# About 15 % each for validation and test. A multiple of four, so that two or four ranks share a set evenly
# and no sample is counted twice to fill up a rank's part.
EVALUATION_SAMPLES = 268


def random_affine(images: Tensor, angle_rad: float = 0.15, scale: float = 0.1, shift: float = 0.1) -> Tensor:
    """Rotate, scale and shift each image by its own random amount.

    Args:
        images: shape (batch, channels, height, width).
        angle_rad: largest rotation, in radians, either way.
        scale: largest relative change of size, either way.
        shift: largest shift, either way, as a part of half the image's side.

    Returns:
        Images of the same shape; what moves in from outside is zero.

    Examples:
        >>> random_affine(torch.ones(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """
    draws = torch.rand(4, len(images), device=images.device, dtype=images.dtype) * 2 - 1
    angles, scales = draws[0] * angle_rad, 1 + draws[1] * scale
    cosines, sines = torch.cos(angles) * scales, torch.sin(angles) * scales
    rows = (
        torch.stack([cosines, -sines, draws[2] * shift], dim=1),
        torch.stack([sines, cosines, draws[3] * shift], dim=1),
    )
    grid = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


class DigitsDataModule(LightningDataModule):
    """Digits as 1x28x28 images in [0, 1]: 1,261 to train, 268 to validate and 268 to test, stratified.

    The 8x8 images are scaled up bilinearly to the size that LeNet-5 expects.

    Args:
        batch_size: samples in a batch of one rank.
        num_workers: processes that load data, per rank. The set lies in memory, so 0 is fastest.
        persistent_workers: keep those processes between epochs; without effect when `num_workers` is 0.
        augment: rotate, scale and shift training images a little, anew in each epoch.
        split_seed: fixes which samples are held out.
    """

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int = 0,
        persistent_workers: bool = False,
        augment: bool = False,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.persistent_workers = persistent_workers and num_workers > 0
        self.augment = augment
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        """Load the images and split them.

        Args:
            stage: the trainer's stage; every stage gets the same split.

        Raises:
            ModuleNotFoundError: if scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The digits come with scikit-learn: pip install 'lightning-async[recipes]'"
            ) from error

        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
        images = interpolate(pixels, size=(28, 28), mode="bilinear", align_corners=False)

        def hold_out(indices: Tensor, samples: int) -> tuple[Tensor, Tensor]:
            kept, held_out = train_test_split(
                indices.numpy(),
                test_size=samples,
                stratify=labels[indices].numpy(),
                random_state=self.split_seed,
            )
            return torch.from_numpy(kept), torch.from_numpy(held_out)

        rest, test = hold_out(torch.arange(len(labels)), EVALUATION_SAMPLES)
        train, val = hold_out(rest, EVALUATION_SAMPLES)
        self.indices = {"train": train, "val": val, "test": test}
        self.train_set = TensorDataset(images[train], labels[train])
        self.val_set = TensorDataset(images[val], labels[val])
        self.test_set = TensorDataset(images[test], labels[test])

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """Augment a training batch, on the device that it will be used on."""
        if self.augment and self.trainer is not None and self.trainer.training:
            images, labels = batch
            return [random_affine(images), labels]
        return batch

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the shuffled training batches."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation batches."""
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test batches."""
        return self._loader(self.test_set, shuffle=False)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test batches."""
        return self._loader(self.test_set, shuffle=False)

    def _loader(self, dataset: TensorDataset, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.persistent_workers,
        )
