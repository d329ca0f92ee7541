"""Sparse rows with two classes: compressed rows in memory, and batches that stay sparse."""

from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_async.cli.requirements import require
from recipes.datasets.base import Part, RecipeDataModule
from recipes.datasets.files import DamagedFileError, find_files, open_binary

__all__ = ["RCV1DataModule", "SparseDataModule", "SparseRows", "SparseSet", "read_libsvm"]

HOME_PAGE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html#rcv1.binary"
TRAIN_FILE, TEST_FILE = "rcv1_train.binary", "rcv1_test.binary"
RCV1_FEATURES = 47_236


class SparseRows(NamedTuple):
    """A batch of sparse rows, one after the other.

    Args:
        columns: column of each value, shape (values,), int32.
        values: the values that are not zero, shape (values,), float32.
        starts: where each row begins in both, shape (batch,), int32.
    """

    columns: Tensor
    values: Tensor
    starts: Tensor


class SparseSet:
    """Sparse rows and their labels, 0 or 1.

    Args:
        bounds: row i has the values from `bounds[i]` up to `bounds[i + 1]`; shape (samples + 1,), int64.
        columns: column of each value, shape (values,), int32.
        values: shape (values,), float32.
        labels: shape (samples,), int64.
    """

    def __init__(self, bounds: Tensor, columns: Tensor, values: Tensor, labels: Tensor) -> None:
        self.bounds = bounds
        self.columns = columns
        self.values = values
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[SparseRows, Tensor]:
        rows, labels = self.__getitems__([index])
        return rows, labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[SparseRows, Tensor]:
        chosen = torch.tensor(indices)
        first = self.bounds[chosen]
        lengths = self.bounds[chosen + 1] - first
        starts = lengths.cumsum(0) - lengths
        # For each value of the batch its place in the whole set.
        places = torch.arange(int(lengths.sum())) + (first - starts).repeat_interleave(lengths)
        return SparseRows(self.columns[places], self.values[places], starts.int()), self.labels[chosen]


def read_libsvm(path: Path, num_features: int) -> SparseSet:
    """Read a libsvm file with labels -1 and 1 and columns from 1 on.

    Args:
        path: the file, compressed if its name ends in .bz2 or .gz.
        num_features: number of columns.

    Returns:
        The rows, with columns from 0 on and labels 0 and 1.

    Raises:
        DamagedFileError: if the file is something else.
    """
    from sklearn.datasets import load_svmlight_file

    try:
        with open_binary(path) as file:
            matrix, signs = load_svmlight_file(file, n_features=num_features, dtype="float32", zero_based=False)
    # Parser and decompressor each raise their own kinds.
    except Exception as error:
        raise DamagedFileError(path, error) from error
    labels = torch.from_numpy(signs)
    if len(labels) == 0 or not bool(((labels == 1) | (labels == -1)).all()):
        raise DamagedFileError(path, "its labels are not all -1 or 1")
    values = torch.from_numpy(matrix.data)
    if not bool(values.isfinite().all()):
        raise DamagedFileError(path, "it has values that are not finite")
    return SparseSet(
        torch.from_numpy(matrix.indptr).long(),
        torch.from_numpy(matrix.indices).int(),
        values,
        (labels > 0).long(),
    )


class SparseDataModule(RecipeDataModule):
    """Batches of sparse rows."""

    @abstractmethod
    def load(self, part: Part) -> SparseSet:
        """Return the rows of a part.

        Args:
            part: which rows.
        """


class RCV1DataModule(SparseDataModule):
    """rcv1 (binary) in libsvm format: 20,242 rows to train and 677,399 to test, with 47,236 columns.

    Args:
        data_dir: folder with rcv1_train.binary and rcv1_test.binary, plain or as .bz2.
        batch_size: training rows in a batch of one rank.
        eval_batch_size: rows in a batch of validation, test and prediction.
        validation_samples: how many of the training rows to hold out for validation; 0 validates on the test set.
            Every rank reads the files that it needs, and the test set's takes long to read and half a gigabyte.
        split_seed: fixes which rows are held out.
        num_workers: processes that load data, per rank.
        num_features: number of columns.

    Raises:
        ModuleNotFoundError: if scikit-learn, which reads the files, is not installed.
    """

    def __init__(
        self,
        data_dir: str = "data/rcv1",
        batch_size: int = 64,
        eval_batch_size: int = 4096,
        validation_samples: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        num_features: int = RCV1_FEATURES,
    ) -> None:
        require("sklearn", "scikit-learn", "libsvm files are read with scikit-learn")
        super().__init__(batch_size, eval_batch_size, validation_samples, split_seed, num_workers)
        self.data_dir = Path(data_dir)
        self.num_features = num_features

    def prepare_data(self) -> None:
        """Look for the files, on one rank of each machine.

        Raises:
            MissingDataError: if any is missing.
        """
        self._find()

    def load(self, part: Part) -> SparseSet:
        """Read the rows of a part.

        Args:
            part: "train", or the test set for both others.

        Raises:
            MissingDataError: if either file is missing.
            DamagedFileError: if a file is not what it should be.
        """
        train, test = self._find()
        return read_libsvm(train if part == "train" else test, self.num_features)

    def _find(self) -> list[Path]:
        return find_files("rcv1 (binary)", self.data_dir, [TRAIN_FILE, TEST_FILE], HOME_PAGE, ".bz2")
