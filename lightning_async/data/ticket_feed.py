"""Feeds a loader with the batches whose tickets its rank draws, and knows where each of them is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch.utils.data import DataLoader

from lightning_async.data.orders import BatchSource, count_indices

__all__ = ["LoaderError", "TicketFeed"]

# A loader's own thread that waits for a ticket while the training thread waits for its batch has this long.
_STALEMATE_S = 1.0
_LOOK_S = 0.25
# A loader that asks for more this often, after it was told that there is none, would never stop.
_REFUSALS = 100


class LoaderError(RuntimeError):
    """A train loader does with its batches what cannot be told from losing or repeating some of them."""


class Discardable(Protocol):
    """An iterator of the loader that drops what it is loading."""

    def discard(self) -> None:
        """Drops it."""


class TicketFeed:
    """Feeds a loader with the batches whose tickets this rank draws.

    A ticket is in one of three places: *drawn* and not asked for yet; *loading* in torch's iterator of the loader; or
    *loaded*, which is to say somewhere in what the loader's class does with its batches. Tickets are drawn in the
    training thread. A loader that iterates in a thread of its own waits there for tickets that were drawn here.

    The loader's worker processes prefetch, and a slow rank would hoard tickets that a fast one could compute. So at
    most as many batches as it has workers are on their way; past that torch's iterator is told a *temporary*
    StopIteration, which ``_MultiProcessingDataLoaderIter._try_put_index`` (torch, ``dataloader.py``) takes as
    "nothing to put now".

    Args:
        loader: the loader; no code of the user's iterates it.
        source: the global order.
        world_size: number of ranks N.
    """

    def __init__(self, loader: DataLoader[Any], source: BatchSource, world_size: int) -> None:
        self._loader = loader
        self._source = source
        self._world_size = world_size
        self._changed = threading.Condition(threading.RLock())
        self._inside = threading.local()
        self._owner = threading.current_thread()
        self._draw: Callable[[], Sequence[int]] | None = None
        self._release: Callable[[int, bool], None] | None = None
        self._leave_out: Callable[[int], None] | None = None
        self._drawn: deque[int] = deque()
        self._loading: deque[int] = deque()
        self._loaded: deque[int] = deque()
        self._active: Discardable | None = None
        self._exhausted = True
        self._over = False
        self._closed = False
        self._pass = 0
        self._delivered = 0
        self._refusals = 0
        self._threaded = False
        self._ahead = True
        self._fetching_since: float | None = None
        self._told: set[int] = set()

    # --- the epoch ---------------------------------------------------------------------------------------------------

    @property
    def global_batches(self) -> int:
        """Batches of the epoch whose order was drawn last, over all ranks."""
        return self._source.drawn

    @property
    def is_complete(self) -> bool:
        """Whether that order is drawn to its end."""
        return self._source.is_complete

    @property
    def digests(self) -> list[str]:
        """Digests of what is drawn of it so far."""
        return self._source.digests

    def __len__(self) -> int:
        """Batches of an epoch *per rank*, as under DDP, so that limits and intervals keep their meaning."""
        return -(-len(self._source) // self._world_size)

    def begin_epoch(self, epoch: int, limit: int | None = None) -> str:
        """Draws the global order of ``epoch``; returns its digest."""
        with self._changed:
            if self._loading:
                self._discard_active()
            for tickets in (self._drawn, self._loading, self._loaded):
                tickets.clear()
            self._over, self._exhausted, self._draw = False, True, None
        self.begin_pass()
        return self._source.begin_epoch(epoch, limit)

    def matches(self, order: str) -> bool:
        """Whether an order of which this is the digest is the one of this epoch."""
        return self._source.matches(order)

    def open(
        self,
        draw: Callable[[], Sequence[int]],
        release: Callable[[int, bool], None],
        leave_out: Callable[[int], None],
        ahead: bool = True,
    ) -> None:
        """Starts a segment, in the thread that trains.

        Args:
            draw: draws tickets; an empty answer means that the segment is over.
            release: told how many of the newest tickets there are no batches for, and that there will be none.
            leave_out: told how many batches the loader has taken and not handed on.
            ahead: whether the loader may load batches ahead, which this rank must then compute.
        """
        with self._changed:
            self._ahead = ahead
            self._owner = threading.current_thread()
            self._draw, self._release, self._leave_out = draw, release, leave_out
            self._exhausted = self._over

    def close(self) -> None:
        """Lets threads that wait for tickets end."""
        with self._changed:
            self._closed = True
            self._draw = None
            self._discard_active()
            self._changed.notify_all()

    # --- the training thread -----------------------------------------------------------------------------------------

    def has_next(self) -> bool:
        """Whether this rank has, or can draw, another ticket in this segment."""
        with self._changed:
            return bool(self._loading or self._loaded) or self._draw_ahead()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """While the private loader is asked for a batch."""
        with self._changed:
            while self._threaded and self._in_flight < self._most_in_flight and self._draw_ahead(further=True):
                continue
            self._fetching_since = time.monotonic()
        try:
            yield
        finally:
            self._fetching_since = None

    def deliver(self) -> int:
        """Notes that the loader has delivered a batch; returns the number of its samples.

        Raises:
            LoaderError: if the batch is none that a ticket was drawn for.
        """
        with self._changed:
            if not self._loaded:
                raise LoaderError(
                    f"{self._name} delivers a batch beyond those that it has asked its batch sampler for, and nobody "
                    "can say which ranks have trained on its samples. Make its iterator in __iter__ and not before, "
                    "and deliver one batch for each; or pass Trainer(use_distributed_sampler=False) and give it a "
                    "DistributedSampler to let each rank walk a loader of its own."
                )
            self._delivered += 1
            return count_indices(self._source[self._loaded.popleft()])

    def begin_pass(self) -> None:
        """Notes that the loader is iterated anew; what waits in threads of the last pass ends."""
        with self._changed:
            self._pass += 1
            self._delivered = self._refusals = 0
            self._changed.notify_all()

    def end_pass(self) -> None:
        """Settles the tickets in hand when the loader's iterator has ended.

        A loader that was told that there is no more leaves out what it has not delivered, as it would under DDP. One
        that has delivered as many batches as it says it has is iterated anew. One that ends before has no further
        batches in this epoch, and others compute them.
        """
        with self._changed:
            if self._refusals:
                if self._loaded and self._leave_out is not None:
                    self._leave_out(len(self._loaded))
                self._loaded.clear()
            elif self._delivered and self._delivered >= self._promised():
                # It may go on with what torch's iterator is loading.
                if self._loaded:
                    self._recall()
            else:
                self._recall()
                count = len(self._drawn)
                self._drawn.clear()
                self._over = self._exhausted = True
                if self._release is not None:
                    self._release(count, True)
        self.begin_pass()

    def _promised(self) -> int:
        try:
            return len(self._loader)
        except TypeError:
            return 1

    def _recall(self) -> None:
        """Takes back what the loader has and does not deliver, to hand it out again."""
        if self._loading:
            self._discard_active()
        self._drawn.extendleft(reversed([*self._loaded, *self._loading]))
        self._loaded.clear()
        self._loading.clear()

    @property
    def _in_flight(self) -> int:
        return len(self._drawn) + len(self._loading) + len(self._loaded)

    @property
    def _most_in_flight(self) -> int:
        return 1 + max(1, self._loader.num_workers) if self._ahead else 1

    @property
    def _name(self) -> str:
        return type(self._loader).__name__

    def _draw_ahead(self, further: bool = False) -> bool:
        """Draws a ticket if there is none, or another one; only the training thread may."""
        if (self._drawn and not further) or self._exhausted or self._draw is None:
            return bool(self._drawn) and not further
        drawn = self._draw()
        ahead = [ticket for ticket in drawn if self._source.has(ticket)]
        self._drawn.extend(ahead)
        self._exhausted = len(ahead) < len(drawn) or not drawn
        if len(ahead) < len(drawn) and self._release is not None:
            # The order has turned out to be shorter than its sampler has said.
            self._over = True
            self._release(len(drawn) - len(ahead), True)
        self._changed.notify_all()
        return bool(ahead)

    # --- the private loader, in whichever thread it iterates ---------------------------------------------------------

    def claim(self, iterator: Discardable | None, created_in: int) -> None:
        """Waits until there is a batch to load for this iterator of the private loader.

        Raises:
            StopIteration: if there is none in this segment, or its pass is over.
        """
        with self._changed:
            foreign = threading.current_thread() is not self._owner
            self._threaded = self._threaded or foreign
            while True:
                # Looked at after each wait: a thread of an earlier pass must not take what this one is to load.
                if foreign and (self._closed or created_in != self._pass):
                    self._refuse(foreign, created_in)
                self.activate(iterator)
                if self._drawn or self._loading:
                    return
                if not foreign:
                    if not self._draw_ahead():
                        self._refuse(foreign, created_in)
                elif self._is_stalemate():
                    self._refuse(foreign, created_in)
                else:
                    self._changed.wait(_LOOK_S)

    def activate(self, iterator: Discardable | None) -> None:
        """Makes this the loader's iterator that is asked; what the last one has not delivered, this one loads again."""
        with self._changed:
            if self._active is not iterator:
                if self._loading:
                    self._discard_active()
                    self.reload()
                self._active = iterator

    @property
    def is_asked_here(self) -> bool:
        """Whether this is the training thread, and it is about to get a batch from the loader."""
        return self._fetching_since is not None and threading.current_thread() is self._owner

    def load_next(self) -> Any:
        """The next batch's indices, for torch's iterator or for a loader that asks its batch sampler itself."""
        with self._changed:
            own = threading.current_thread() is self._owner
            if not getattr(self._inside, "iterator", False):
                self.claim(None, self._pass)
                self._loaded.append(self._drawn.popleft())
                return self._source[self._loaded[-1]]
            # `_most_loading` keeps a loader's workers from running ahead of the training loop.
            if len(self._loading) >= self._most_loading or not (self._drawn or (own and self._draw_ahead())):
                raise StopIteration
            self._loading.append(self._drawn.popleft())
            return self._source[self._loading[-1]]

    def reload(self) -> None:
        """Takes back what torch's iterator is loading, as it begins anew."""
        with self._changed:
            self._drawn.extendleft(reversed(self._loading))
            self._loading.clear()

    def came_out(self) -> None:
        """Notes that torch's iterator has loaded the oldest batch that it was given."""
        with self._changed:
            if self._loading:
                self._loaded.append(self._loading.popleft())

    @property
    def most_loading(self) -> int:
        """Batches that torch's iterator may be given before it delivers one."""
        return self._most_loading

    @property
    def _most_loading(self) -> int:
        workers = self._loader.num_workers
        if not workers or not self._ahead:
            return 1
        return min(workers + 1, workers * (self._loader.prefetch_factor or 1))

    @property
    def loading(self) -> int:
        """Batches that torch's iterator was given and has not delivered."""
        return len(self._loading)

    @property
    def current_pass(self) -> int:
        """Number of the pass over the private loader."""
        return self._pass

    @contextmanager
    def loads(self) -> Iterator[None]:
        """While torch's iterator is at work, and asks for indices on its own account."""
        self._inside.iterator = True
        try:
            yield
        finally:
            self._inside.iterator = False

    def _is_stalemate(self) -> bool:
        since = self._fetching_since
        return not self._owner.is_alive() or (since is not None and time.monotonic() - since > _STALEMATE_S)

    def _refuse(self, foreign: bool, created_in: int) -> None:
        if not foreign or created_in == self._pass:
            self._refusals += 1
        if foreign and self._closed:
            if threading.get_ident() in self._told:
                # A thread that would go on for ever ends.
                raise SystemExit
            self._told.add(threading.get_ident())
        if self._refusals > _REFUSALS:
            raise LoaderError(
                f"{self._name} asks for another batch again and again although there is none. Let its __iter__ end "
                "where its batches do, or pass Trainer(use_distributed_sampler=False) to let each rank walk a loader "
                "of its own."
            )
        raise StopIteration

    def _discard_active(self) -> None:
        if self._active is not None:
            self._active.discard()
        self._active = None
