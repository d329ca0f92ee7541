"""Text that every Python brings along, character by character: the language model's data without a download."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from recipes.datasets.base import Part, RecipeDataModule

__all__ = ["HelpTextDataModule", "TextWindows"]

# Of the text; the rest is for validation and test.
_TRAINING_PART, _VALIDATION_PART = 0.9, 0.05


class TextWindows:
    """Windows of a text that do not overlap: inputs and the characters that follow them.

    Args:
        characters: the text as numbers, shape (length,).
        block: characters in a window.
    """

    def __init__(self, characters: Tensor, block: int) -> None:
        count = (len(characters) - 1) // block
        self.inputs = characters[: count * block].view(count, block)
        self.targets = characters[1 : count * block + 1].view(count, block)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a window and what follows each of its characters, both of shape (block,)."""
        return self.inputs[index].long(), self.targets[index].long()

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch of windows, both of shape (batch, block)."""
        return self.inputs[indices].long(), self.targets[indices].long()


class HelpTextDataModule(RecipeDataModule):
    """The topics of Python's interactive help (`pydoc_data`), about half a million characters of English.

    The characters are those of printable ASCII and the line's end; others are left out. The last tenth of the text is
    for validation and test.

    Args:
        block: characters that the model sees at once.
        train_samples: windows to train on; `None` takes all.
        batch_size: training windows in a batch of one rank.
        eval_batch_size: windows in a batch of validation, test and prediction.
        num_workers: processes that load data, per rank.

    Raises:
        ValueError: if a number is out of range.
    """

    #: Size of the model's vocabulary.
    vocabulary = 96

    def __init__(
        self,
        block: int = 64,
        train_samples: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, 0, 0, num_workers)
        if block < 1 or (train_samples is not None and train_samples < 1):
            raise ValueError(f"block and train_samples are at least 1, got {block} and {train_samples}")
        self.block = block
        self.train_samples = train_samples

    def load(self, part: Part) -> TextWindows:
        """Return the windows of a part.

        Args:
            part: which part of the text.
        """
        text = help_text()
        first, second = (round(len(text) * share) for share in (_TRAINING_PART, _TRAINING_PART + _VALIDATION_PART))
        begin, end = {"train": (0, first), "val": (first, second), "test": (second, len(text))}[part]
        windows = TextWindows(text[begin:end], self.block)
        if part == "train" and self.train_samples is not None:
            windows.inputs = windows.inputs[: self.train_samples]
            windows.targets = windows.targets[: self.train_samples]
        return windows


def help_text() -> Tensor:
    """Return the text as numbers below 96, shape (length,): 0 is the line's end, 1 the space."""
    topics: dict[str, Any] = import_module("pydoc_data.topics").topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int16)
    kept = codes[(codes == ord("\n")) | ((codes >= ord(" ")) & (codes < 127))]
    return torch.where(kept == ord("\n"), 0, kept - ord(" ") + 1).to(torch.int16)
