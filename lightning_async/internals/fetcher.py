"""The fetcher of train batches: asks for a ticket before it asks the loader.

Below `loops.py`; above `tickets.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES, CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_async.tickets import TicketSampler

__all__ = ["TicketFetcher"]


class TicketFetcher(_DataFetcher):
    """Fetches the batches whose tickets this rank draws.

    Args:
        on_batch: called with the number of samples of each batch, before the batch is used.
    """

    def __init__(self, on_batch: Callable[[int], None]) -> None:
        super().__init__()
        self._on_batch = on_batch
        self._sampler: TicketSampler | None = None

    @override
    def setup(self, combined_loader: CombinedLoader) -> None:
        super().setup(combined_loader)
        self._sampler = ticket_sampler(combined_loader)

    @property
    def sampler(self) -> TicketSampler:
        """The sampler that draws the tickets."""
        assert self._sampler is not None
        return self._sampler

    @override
    def __iter__(self) -> TicketFetcher:
        # Lightning calls iter() during set-up, when there are no tickets yet; the loader's own iterator, with its
        # worker processes, is made when a segment's first batch is fetched. Until then this one answers len().
        loader = self.combined_loader
        loader._iterator = _SUPPORTED_MODES[loader._mode]["iterator"](loader.flattened, loader._limits)
        self.iterator = None
        self.reset()
        return self

    @override
    def reset(self) -> None:
        # The length says nothing of how many batches this rank gets, so "done" never comes from it.
        self.fetched, self.length, self.done = 0, None, False

    def open(self, draw: Callable[[], range]) -> None:
        """Starts a segment."""
        self.iterator = None
        self.sampler.open(draw)

    def has_next(self) -> bool:
        """Whether this rank gets another batch in this segment; draws a ticket if it must."""
        return self.sampler.has_next()

    @override
    def __next__(self) -> Any:
        if self.iterator is None:
            self.iterator = iter(self.combined_loader)
        self.sampler.allow_another()
        batch = super().__next__()
        self._on_batch(self.sampler.take_samples())
        return batch


def ticket_sampler(combined_loader: CombinedLoader) -> TicketSampler:
    """The ticket sampler of a train loader.

    Raises:
        MisconfigurationException: if the loader is not one that batches can be handed out from.
    """
    loaders = combined_loader.flattened
    if len(loaders) != 1:
        raise MisconfigurationException(
            f"lightning_async hands out the batches of one train DataLoader and was given {len(loaders)}. "
            'Combine the data sets in one DataLoader, or use strategy="ddp".'
        )
    sampler = getattr(loaders[0], "batch_sampler", None)
    if sampler is None:
        sampler = getattr(loaders[0], "sampler", None)
    if not isinstance(sampler, TicketSampler):
        raise MisconfigurationException(
            "lightning_async hands out the batches of a map-style torch DataLoader whose order is the same on every "
            f"rank; it cannot take {type(loaders[0]).__name__} with this data set or sampler. Pass a DataLoader over "
            "a map-style Dataset, without a DistributedSampler of your own and without "
            'use_distributed_sampler=False, or use strategy="ddp".'
        )
    return sampler
