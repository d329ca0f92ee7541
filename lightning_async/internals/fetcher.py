"""The fetcher of train batches: draws a ticket before it asks the loader.

Below `loops.py` and `epochs.py`; above `tickets.py` (one order that all ranks share) and `streams.py` (a stream for
each rank).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES, CombinedLoader
from typing_extensions import override

from lightning_async.streams import OwnStream, count_samples
from lightning_async.tickets import TicketSampler

__all__ = ["TicketFetcher"]


class TicketFetcher(_DataFetcher):
    """Fetches a batch for each ticket that this rank draws.

    Where all ranks walk one order, a ticket is a position in it. Where they cannot (an `IterableDataset`, several
    loaders, a sampler of the user's own for each rank), a ticket permits to take the next batch of this rank's stream.

    Args:
        on_batch: called with the number of samples of each batch, before the batch is used.

    Attributes:
        stream_length: batches of this rank's own stream, without the trainer's limit; None if nobody knows.
    """

    def __init__(self, on_batch: Callable[[int], None]) -> None:
        super().__init__()
        self._on_batch = on_batch
        self._sampler: TicketSampler | None = None
        self._stream = OwnStream(self._next_of_stream)
        self.stream_length: int | None = None

    @override
    def setup(self, combined_loader: CombinedLoader) -> None:
        super().setup(combined_loader)
        self._sampler = _ticket_sampler(combined_loader)
        self.stream_length = None if self._sampler is not None else sized_len(_mode_iterator(combined_loader, None))

    @property
    def is_shared(self) -> bool:
        """Whether all ranks walk one order of batches."""
        return self._sampler is not None

    @property
    def shared_batches(self) -> int:
        """Batches of the order that all ranks walk; exact once it was drawn."""
        assert self._sampler is not None
        return self._sampler.global_batches

    def begin_epoch(self, epoch: int) -> str:
        """Draws the order of ``epoch``, or begins this rank's stream anew.

        Returns:
            A digest of the order; that of a stream is empty.
        """
        self.iterator, self.done = None, False
        self._stream.begin_epoch()
        return "" if self._sampler is None else self._sampler.begin_epoch(epoch)

    @override
    def __iter__(self) -> TicketFetcher:
        # Lightning calls iter() during set-up, when there are no tickets yet; the loader's own iterator, with its
        # worker processes, is made when the first batch is fetched. Until then this one answers len().
        loader = self.combined_loader
        loader._iterator = _mode_iterator(loader, loader._limits)
        self.iterator = None
        self.reset()
        return self

    @override
    def reset(self) -> None:
        # The length says nothing of how many batches this rank gets, so "done" never comes from it.
        self.fetched, self.length, self.done = 0, None, False

    def open(self, draw: Callable[[], range], give_back: Callable[[int, bool], None], ahead: bool = True) -> None:
        """Starts a segment.

        Args:
            draw: draws tickets.
            give_back: gives back tickets that there are no batches for.
            ahead: whether the loader's workers may fetch batches ahead, which this rank must then compute.
        """
        if self._sampler is None:
            # A stream goes on where the last segment has left it.
            self._stream.open(draw, give_back)
            return
        self.iterator = None
        self._sampler.open(draw, ahead)

    def has_next(self) -> bool:
        """Whether this rank gets another batch in this segment; draws a ticket if it must."""
        return self._stream.has_next() if self._sampler is None else self._sampler.has_next()

    @override
    def __next__(self) -> Any:
        if self._sampler is None:
            batch = self._stream.take()
            self._on_batch(count_samples(batch[0]))
            return batch
        self._sampler.allow_another()
        batch = self._next_of_loader()
        self._on_batch(self._sampler.take_samples())
        return batch

    def _next_of_stream(self) -> Any:
        # Lightning, too, believes a loader that says how long it is.
        if self.stream_length is not None and self.fetched >= self.stream_length:
            raise StopIteration
        return self._next_of_loader()

    def _next_of_loader(self) -> Any:
        if self.iterator is None:
            self.iterator = iter(self.combined_loader)
        return super().__next__()


def _mode_iterator(combined_loader: CombinedLoader, limits: Any) -> Any:
    kind: Any = _SUPPORTED_MODES[combined_loader._mode]["iterator"]
    return kind(combined_loader.flattened, limits)


def _ticket_sampler(combined_loader: CombinedLoader) -> TicketSampler | None:
    """The sampler that draws tickets, if there is one loader and it has been given one."""
    if len(combined_loader.flattened) != 1:
        return None
    (loader,) = combined_loader.flattened
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, TicketSampler) else None
