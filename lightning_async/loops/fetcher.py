"""The fetcher of train batches: draws a ticket before it asks the loader."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES, CombinedLoader
from typing_extensions import override

from lightning_async.data.shared_loader import SharedLoader, shared_behind
from lightning_async.data.streams import OwnStream, count_samples
from lightning_async.data.ticket_feed import TicketFeed

__all__ = ["TicketFetcher", "shared_loader"]


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
        self._shared: SharedLoader | None = None
        self._feed: TicketFeed | None = None
        self._private: CombinedLoader | None = None
        self._fetched: list[Any] = []
        self._stream = OwnStream(self._next_of_stream)
        self.stream_length: int | None = None

    @override
    def setup(self, combined_loader: CombinedLoader) -> None:
        super().setup(combined_loader)
        self._close()
        self.stream_length = None
        self._shared = shared_loader(combined_loader)
        if self._shared is None:
            self.stream_length = sized_len(_mode_iterator(combined_loader, None))
        else:
            self._feed = self._shared.feed
            self._private = copy.copy(combined_loader)
            self._private.flattened = [self._shared.loader]

    @override
    def teardown(self) -> None:
        self._close()
        super().teardown()

    @property
    def is_shared(self) -> bool:
        """Whether all ranks walk one order of batches."""
        return self._feed is not None

    @property
    def shared_batches(self) -> int:
        """Batches of the order that all ranks walk; exact once it was drawn to its end."""
        assert self._feed is not None
        return self._feed.global_batches

    @property
    def draws_further(self) -> bool:
        """Whether the order that all ranks walk is longer than what was drawn of it."""
        return self._feed is not None and not self._feed.is_complete

    @property
    def digests(self) -> list[str]:
        """Digests of what is drawn of that order."""
        return [] if self._feed is None else self._feed.digests

    def begin_epoch(self, epoch: int, limit: int | None) -> str:
        """Draws the order of ``epoch``, or begins this rank's stream anew.

        Args:
            epoch: number of the epoch.
            limit: batches that it has at most, over all ranks.

        Returns:
            A digest of the order; that of a stream is empty.
        """
        self.iterator, self.done = None, False
        self._stream.begin_epoch()
        self._fetched.clear()
        return "" if self._shared is None else self._shared.begin_epoch(epoch, limit)

    def matches(self, order: str) -> bool:
        """Whether the epoch that was begun is the one whose digest this is."""
        return order == "" if self._feed is None else self._feed.matches(order)

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

    def open(
        self,
        draw: Callable[[], range],
        release: Callable[[int, bool], None],
        leave_out: Callable[[int], None],
        ahead: bool = True,
    ) -> None:
        """Starts a segment; the loader goes on where the last segment has left it.

        Args:
            draw: draws tickets.
            release: gives back tickets that there are no batches for.
            leave_out: told of batches that the loader has taken and does not hand on.
            ahead: whether the loader may load batches ahead, which this rank must then compute.
        """
        if self._feed is None:
            self._stream.open(draw, release)
        else:
            self._feed.open(draw, release, leave_out, ahead)

    def has_next(self) -> bool:
        """Whether this rank gets another batch in this segment; draws a ticket if it must, and fetches the batch."""
        if self._feed is None:
            return self._stream.has_next()
        while not self._fetched and self._feed.has_next():
            self._fetch(self._feed)
        return bool(self._fetched)

    def _fetch(self, feed: TicketFeed) -> None:
        """Asks the private loader for a batch; settles the end of its iterator."""
        try:
            with feed.fetching():
                self._fetched.append(self._next_of_loader())
        except StopIteration:
            self.iterator, self.done = None, False
            feed.end_pass()

    @override
    def __next__(self) -> Any:
        if self._feed is None:
            batch = self._stream.take()
            self._on_batch(count_samples(batch[0]))
            return batch
        samples = self._feed.deliver()
        self._on_batch(samples)
        return self._fetched.pop()

    def _next_of_stream(self) -> Any:
        # Lightning, too, believes a loader that says how long it is.
        if self.stream_length is not None and self.fetched >= self.stream_length:
            raise StopIteration
        return self._next_of_loader()

    def _next_of_loader(self) -> Any:
        if self.iterator is None:
            self.iterator = iter(self.combined_loader if self._private is None else self._private)
        return super().__next__()

    def _close(self) -> None:
        if self._shared is not None:
            self._shared.close()
        self._shared = self._feed = self._private = None


def shared_loader(combined_loader: CombinedLoader) -> SharedLoader | None:
    """What is behind the train loader that all ranks share, if there is one loader and it is shared."""
    loaders = combined_loader.flattened
    return shared_behind(loaders[0]) if len(loaders) == 1 else None


def _mode_iterator(combined_loader: CombinedLoader, limits: Any) -> Any:
    kind: Any = _SUPPORTED_MODES[combined_loader._mode]["iterator"]
    return kind(combined_loader.flattened, limits)
