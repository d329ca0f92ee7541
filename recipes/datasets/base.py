"""What the data modules of the recipes share: parts, batches and loaders."""

from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

__all__ = ["BatchedDataset", "Part", "RecipeDataModule"]

Part = Literal["train", "val", "test"]


class BatchedDataset(Protocol):
    """A map-style data set that puts a whole batch together at once, which is much quicker than one by one."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""

    def __getitems__(self, indices: list[int]) -> Any:
        """Return a batch: inputs and labels, each with the samples along its first dimension."""


class RecipeDataModule(LightningDataModule, ABC):
    """Loaders over map-style data sets that lie in memory, and a validation set held out on request.

    A subclass says with `load` what each part is.

    Args:
        batch_size: training samples in a batch of one rank.
        eval_batch_size: samples in a batch of validation, test and prediction.
        validation_samples: how many of the training samples to hold out for validation; 0 validates on what the
            data set has for that purpose, or else on the test set.
        split_seed: fixes which samples are held out.
        num_workers: processes that load data, per rank. Everything lies in memory, so 0 is mostly fastest.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        validation_samples: int,
        split_seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1 or validation_samples < 0:
            raise ValueError(
                "batch_size and eval_batch_size are at least 1 and validation_samples is not negative, "
                f"got {batch_size}, {eval_batch_size} and {validation_samples}"
            )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_samples = validation_samples
        self.split_seed = split_seed
        self.num_workers = num_workers
        self._parts: dict[Part, BatchedDataset] = {}

    @abstractmethod
    def load(self, part: Part) -> BatchedDataset:
        """Return the samples of a part; "val" if `validation_samples` is 0.

        Args:
            part: which samples.
        """

    def setup(self, stage: str) -> None:
        """Load the parts that a stage needs, once.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            MissingDataError: if files are missing.
            DamagedFileError: if a file is not what it should be.
            ValueError: if `validation_samples` leaves no training samples.
        """
        parts: dict[str, tuple[Part, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for part in parts.get(stage, ("test",)):
            if part not in self._parts:
                self._load(part)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the shuffled training batches."""
        return self._loader(self._parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches."""
        return self._loader(self._parts["val"], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self._loader(self._parts["test"], self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self.test_dataloader()

    def _load(self, part: Part) -> None:
        if part == "test" or self.validation_samples == 0:
            self._parts[part] = self.load(part)
            return
        everything = self.load("train")
        kept = len(everything) - self.validation_samples
        if kept < 1:
            raise ValueError(
                f"validation_samples={self.validation_samples} leaves nothing of {len(everything)} training samples"
            )
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        # Subset hands whole batches of indices on.
        self._parts["train"] = Subset(everything, sorted(order[:kept]))  # type: ignore[arg-type]
        self._parts["val"] = Subset(everything, sorted(order[kept:]))  # type: ignore[arg-type]

    def _loader(self, dataset: BatchedDataset, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_it_is,
        )


def _as_it_is(batch: Any) -> Any:
    return batch
