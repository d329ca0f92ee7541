"""The data sets of the recipes: readers of their official files, and generated data of the same shapes."""

from recipes.datasets.cifar10 import CIFAR10DataModule
from recipes.datasets.cinic10 import CINIC10DataModule
from recipes.datasets.files import DamagedFileError, MissingDataError
from recipes.datasets.imagenet32 import ImageNet32DataModule
from recipes.datasets.interactions import SyntheticInteractionsDataModule
from recipes.datasets.mnist import MNISTDataModule
from recipes.datasets.sparse import RCV1DataModule, SparseRows
from recipes.datasets.synthetic import SyntheticImagesDataModule, SyntheticSparseDataModule
from recipes.datasets.text import HelpTextDataModule

__all__ = [
    "CIFAR10DataModule",
    "CINIC10DataModule",
    "DamagedFileError",
    "HelpTextDataModule",
    "ImageNet32DataModule",
    "MNISTDataModule",
    "MissingDataError",
    "RCV1DataModule",
    "SparseRows",
    "SyntheticImagesDataModule",
    "SyntheticInteractionsDataModule",
    "SyntheticSparseDataModule",
]
