"""Generated ratings of items by users: the data of models that are made of embeddings."""

import torch
from torch import Tensor

from recipes.datasets.base import Part, RecipeDataModule
from recipes.datasets.synthetic import generators

__all__ = ["InteractionSet", "SyntheticInteractionsDataModule"]


class InteractionSet:
    """Pairs of a user and an item, and whether the user liked it.

    Args:
        pairs: shape (samples, 2).
        liked: 0 or 1, shape (samples,).
    """

    def __init__(self, pairs: Tensor, liked: Tensor) -> None:
        self.pairs = pairs
        self.liked = liked

    def __len__(self) -> int:
        """Return the number of ratings."""
        return len(self.liked)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a pair, shape (2,), and its label."""
        return self.pairs[index], self.liked[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: pairs of shape (batch, 2), labels of shape (batch,)."""
        return self.pairs[indices], self.liked[indices]


class SyntheticInteractionsDataModule(RecipeDataModule):
    """Ratings that follow hidden factors of users and items; few items are rated often, and many seldom.

    Args:
        users: number of users.
        items: number of items.
        factors: hidden factors of each.
        train_samples: ratings to train on.
        eval_samples: ratings to validate, and again to test.
        seed: fixes everything.
        batch_size: training ratings in a batch of one rank.
        eval_batch_size: ratings in a batch of validation, test and prediction.
        num_workers: processes that load data, per rank.

    Raises:
        ValueError: if a number is less than 1.
    """

    def __init__(
        self,
        users: int = 2_000,
        items: int = 1_000,
        factors: int = 4,
        train_samples: int = 60_000,
        eval_samples: int = 10_000,
        seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 2_000,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, 0, 0, num_workers)
        numbers = (users, items, factors, train_samples, eval_samples)
        if min(numbers) < 1:
            raise ValueError(f"users, items, factors and numbers of samples are at least 1, got {numbers}")
        self.users = users
        self.items = items
        self.factors = factors
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.seed = seed

    def load(self, part: Part) -> InteractionSet:
        """Generate the ratings of a part.

        Args:
            part: which ratings.
        """
        common, own = generators(self.seed, part)
        of_users = torch.randn(self.users, self.factors, generator=common)
        of_items = torch.randn(self.items, self.factors, generator=common)
        popularity = torch.randn(self.items, generator=common)
        count = self.train_samples if part == "train" else self.eval_samples
        users = torch.randint(self.users, (count,), generator=own)
        # As words of a text are: the c-th item about 1 / (c + 1) as often as the first.
        uniform = torch.rand(count, generator=own, dtype=torch.float64)
        items = (((self.items + 1.0) ** uniform - 1).long()).clamp_(max=self.items - 1)
        logits = 1.5 * (of_users[users] * of_items[items]).sum(1) / self.factors**0.5 + 0.5 * popularity[items]
        liked = (torch.rand(count, generator=own) < logits.sigmoid()).long()
        return InteractionSet(torch.stack([users, items], dim=1), liked)
