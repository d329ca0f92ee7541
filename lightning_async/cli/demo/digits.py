"""Digits that need no download: scikit-learn's bundled set of 1,797 handwritten ones, or as many drawn ones."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from lightning_async.cli.demo.glyphs import draw_digits, random_affine
from lightning_async.cli.requirements import is_installed, require

__all__ = ["EVALUATION_SAMPLES", "DigitsDataModule", "Source", "available_source"]

Source = Literal["scikit-learn", "drawn"]

# About 15 % each for validation and test. A multiple of four, so that two or four ranks share a set evenly
# and no sample is counted twice to fill up a rank's part.
EVALUATION_SAMPLES = 268
_SAMPLES = 1797


def available_source() -> Source:
    """Scikit-learn's digits where it is installed, else drawn ones."""
    return "scikit-learn" if is_installed("sklearn") else "drawn"


class DigitsDataModule(LightningDataModule):
    """Digits as 1x28x28 images in [0, 1]: 1,261 to train, 268 to validate and 268 to test, stratified.

    Scikit-learn's 8x8 images are scaled up bilinearly to the size that LeNet-5 expects.

    Args:
        batch_size: samples in a batch of one rank.
        num_workers: processes that load data, per rank. The set lies in memory, so 0 is fastest.
        persistent_workers: keep those processes between epochs; without effect when `num_workers` is 0.
        augment: rotate, scale and shift training images a little, anew in each epoch.
        split_seed: fixes which samples are held out, and what is drawn.
        source: scikit-learn's handwritten digits, or ``"drawn"`` ones, which need nothing else to be installed.

    Raises:
        ModuleNotFoundError: if scikit-learn's digits are asked for and it is not installed.
    """

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int = 0,
        persistent_workers: bool = False,
        augment: bool = False,
        split_seed: int = 0,
        source: Source = "scikit-learn",
    ) -> None:
        if source == "scikit-learn":
            require("sklearn", "scikit-learn", "the handwritten digits come with scikit-learn")
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.persistent_workers = persistent_workers and num_workers > 0
        self.augment = augment
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        """Load the images and split them.

        Args:
            stage: the trainer's stage; every stage gets the same split.
        """
        load = _load_handwritten if self.source == "scikit-learn" else _draw
        images, labels, self.indices = load(self.split_seed)
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[part], labels[part]) for part in self.indices.values()
        )

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


_Split = dict[str, Tensor]


def _load_handwritten(split_seed: int) -> tuple[Tensor, Tensor, _Split]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
    images = interpolate(pixels, size=(28, 28), mode="bilinear", align_corners=False)

    def hold_out(indices: Tensor) -> tuple[Tensor, Tensor]:
        kept, held_out = train_test_split(
            indices.numpy(),
            test_size=EVALUATION_SAMPLES,
            stratify=labels[indices].numpy(),
            random_state=split_seed,
        )
        return torch.from_numpy(kept), torch.from_numpy(held_out)

    rest, test = hold_out(torch.arange(len(labels)))
    train, val = hold_out(rest)
    return images, labels, {"train": train, "val": val, "test": test}


def _draw(seed: int) -> tuple[Tensor, Tensor, _Split]:
    # In turn, so that every digit is as frequent in each part as in the whole.
    labels = torch.arange(_SAMPLES) % 10
    first_test = _SAMPLES - EVALUATION_SAMPLES
    first_val = first_test - EVALUATION_SAMPLES
    train, val, test = (
        torch.arange(first, end) for first, end in ((0, first_val), (first_val, first_test), (first_test, _SAMPLES))
    )
    return draw_digits(labels, seed), labels, {"train": train, "val": val, "test": test}
