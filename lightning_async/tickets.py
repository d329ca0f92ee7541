"""Hand-out of batches: the ledger on rank 0 and the sampler in every rank.

A ticket is a position in the epoch's one global order of batches. The ledger says who may compute which ticket and
which are applied; the sampler turns the tickets that its rank drew into the indices of samples. Used by `session.py`
(ledger), `internals/` and `strategy.py` (sampler). Imports no Lightning.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_async.ranges import UNBOUNDED, RangeSet, TicketQueue

__all__ = ["BatchSource", "Ledger", "TicketSampler", "share_loader"]


class Ledger:
    """Who may compute which ticket of this epoch, and which tickets are applied; a monitor on rank 0.

    An epoch is cut into segments (training between two validations). A segment hands out a number of tickets and is
    over when they are gone, or when someone closes it; tickets that were not handed out stay for the next segment.

    With ``batches="shared"`` whoever asks gets the next ticket. With ``"sharded"`` ticket ``t`` belongs to worker
    ``(t // block) mod N``, so every worker gets an equal share.

    Args:
        workers: number of workers N.
        batches: the hand-out rule.

    Examples:
        >>> ledger = Ledger(workers=2, batches="shared")
        >>> ledger.begin_epoch(range(3))
        >>> ledger.open(3)
        >>> [list(ledger.draw(worker)) for worker in (0, 1, 0, 1)]
        [[0], [1], [2], []]
    """

    def __init__(self, workers: int, batches: Literal["shared", "sharded"] = "shared") -> None:
        self._lock = threading.Lock()
        self._workers = workers
        self._batches = batches
        self._block = 1
        self._stop = 0
        self._queues = [TicketQueue([])]
        self._allowance = [0]
        self._closed = False
        self._leased: dict[int, deque[int]] = {worker: deque() for worker in range(workers)}
        self._without_batch: set[int] = set()
        self._over: set[int] = set()
        self._applied = RangeSet()

    def begin_epoch(self, tickets: range, block: int = 1, applied: Iterable[tuple[int, int]] = ()) -> None:
        """Starts an epoch.

        Args:
            tickets: the epoch's tickets, up to `ranges.UNBOUNDED` if its end is not known. What comes before the first
                one counts as applied.
            block: tickets handed out at once: the number of micro-batches that make one update, so that the
                micro-batches of an update stay on one worker.
            applied: tickets that are done already, as ``(start, stop)``: an epoch that is resumed.
        """
        with self._lock:
            self._stop = tickets.stop
            self._applied = RangeSet([(0, tickets.start), *applied])
            self._deal(block, 1 if self._batches == "shared" else self._workers)
            self._without_batch = set(range(self._workers))
            self._over = set()
            # Batches that were on their way when an epoch was left early are lost with it.
            for leased in self._leased.values():
                leased.clear()

    def regroup(self, block: int, equal_shares: bool) -> None:
        """Deals what is left of the epoch anew, while nobody has a ticket.

        Args:
            block: tickets handed out at once from here on.
            equal_shares: whether every worker gets an equal share, also where batches are shared.
        """
        with self._lock:
            self._deal(block, 1 if self._batches == "shared" and not equal_shares else self._workers)
            for share in range(len(self._queues)):
                self._clear_if_nobody_draws(share)

    def open(self, tickets: int) -> None:
        """Opens a segment in which the next ``tickets`` tickets, in the global order, may be drawn."""
        with self._lock:
            end = self._end_of_next(tickets)
            self._allowance = [queue.count_below(end) for queue in self._queues]
            self._closed = False

    def close(self) -> None:
        """Ends the segment early: no further ticket is handed out until the next one opens."""
        with self._lock:
            self._closed = True

    def draw(self, worker: int) -> range:
        """Hands the next block of tickets to ``worker``; an empty range means that its segment is over.

        Each worker's first batch of an epoch is kept for it: metrics that are reduced over the ranks at the end of
        an epoch must have been logged on every one of them.
        """
        with self._lock:
            if self._closed or worker in self._over:
                return range(0)
            index = worker % len(self._queues)
            allowance = self._allowance[index]
            if len(self._queues) == 1 and self._without_batch and worker not in self._without_batch:
                allowance -= len(self._without_batch) * self._block
                if allowance < self._block:
                    # A part of a block would make two updates of one.
                    return range(0)
            drawn = self._queues[index].take(allowance)
            if drawn:
                self._allowance[index] -= len(drawn)
                self._leased[worker].extend(drawn)
                self._without_batch.discard(worker)
            return drawn

    def complete(self, worker: int, tickets: int) -> tuple[int, ...]:
        """Marks the oldest ``tickets`` leases of ``worker`` as applied and returns them.

        Raises:
            ValueError: if the worker holds fewer leases than it says it has computed.
        """
        with self._lock:
            leased = self._leased[worker]
            if tickets > len(leased):
                raise ValueError(f"worker {worker} reports {tickets} batches but was handed {len(leased)}")
            done = tuple([leased.popleft() for _ in range(tickets)])
            for ticket in done:
                self._applied.add(ticket, ticket + 1)
            return done

    def give_back(self, worker: int, tickets: int, stream_over: bool) -> None:
        """Takes back the newest ``tickets`` leases of ``worker``, which it has no batches for.

        Args:
            worker: the worker.
            tickets: how many.
            stream_over: the worker's own stream has ended: it gets nothing more in this epoch.

        Raises:
            ValueError: if the worker holds fewer leases than it gives back.
        """
        with self._lock:
            leased = self._leased[worker]
            if tickets > len(leased):
                raise ValueError(f"worker {worker} gives back {tickets} batches but was handed {len(leased)}")
            self._put_back(leased.pop() for _ in range(tickets))
            if stream_over:
                self._over.add(worker)
                self._without_batch.discard(worker)
            self._clear_if_nobody_draws(worker % len(self._queues))

    def leased(self, worker: int) -> int:
        """Number of tickets handed to ``worker`` and not applied."""
        with self._lock:
            return len(self._leased[worker])

    def reclaim(self, worker: int) -> int:
        """Takes back what ``worker`` was handed and has not finished, to be handed out first; returns how many."""
        with self._lock:
            leased = self._leased[worker]
            count = len(leased)
            self._put_back(leased)
            leased.clear()
            return count

    def progress(self) -> tuple[int, int]:
        """``(applied, not yet handed out)``: how many tickets of this epoch, what it was resumed with included."""
        with self._lock:
            return len(self._applied), sum(queue.count for queue in self._queues)

    def applied(self) -> list[tuple[int, int]]:
        """The tickets of this epoch that are applied, as ``(start, stop)`` in rising order."""
        with self._lock:
            return self._applied.pairs()

    def _deal(self, block: int, shares: int) -> None:
        self._block = block
        left = self._applied.missing(self._stop)
        self._queues = [TicketQueue(left, block, share, shares) for share in range(shares)]
        self._allowance = [0] * shares

    def _clear_if_nobody_draws(self, share: int) -> None:
        if self._over.issuperset(range(share, self._workers, len(self._queues))):
            self._queues[share].clear()
            self._allowance[share] = 0

    def _put_back(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            index = (ticket // self._block) % len(self._queues)
            self._queues[index].put_back(ticket)
            self._allowance[index] += 1

    def _end_of_next(self, tickets: int) -> int:
        """The ticket that the next ``tickets`` undrawn ones come before."""
        low, high = 0, UNBOUNDED
        while low < high:
            middle = (low + high) // 2
            if sum(queue.count_below(middle) for queue in self._queues) < tickets:
                low = middle + 1
            else:
                high = middle
        return low


class BatchSource:
    """The epoch's global order of batches, the same on every rank.

    Args:
        batches: the loader's batch sampler (or its sampler, where the loader does not batch); it must know its
            length.
        seed: the seed of the run. Samplers that draw from a global generator (Python's, NumPy's, torch's) are run
            under ``seed + epoch``, so that all ranks walk the same order.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches = batches
        self._seed = seed
        self._order: list[Any] | None = None

    def __len__(self) -> int:
        """Batches of an epoch, as their sampler says; Lightning's limits and intervals are made from it."""
        return len(self.batches)

    @property
    def drawn(self) -> int:
        """Batches of the epoch whose order was drawn; what the sampler says before that.

        A sampler that fills its batches by length, for instance, may only estimate how many there are. As under DDP,
        an epoch ends where its batches do, and no later than it says.
        """
        return len(self) if self._order is None else min(len(self), len(self._order))

    def begin_epoch(self, epoch: int) -> str:
        """Draws the order of ``epoch`` and returns its digest: two orders are the same if their digests are."""
        with _seeded(self._seed + epoch):
            self._order = list(self.batches)
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._order:
            digest.update(repr(batch).encode())
        return digest.hexdigest()

    def __getitem__(self, ticket: int) -> Any:
        assert self._order is not None
        return self._order[ticket]


class TicketSampler:
    """Yields the batches whose tickets this rank drew; takes the place of a DataLoader's batch sampler.

    The loader's worker processes prefetch through this sampler, and a slow rank would hoard tickets that a fast one
    could compute. So at most ``prefetch`` batches are on their way; past that the iterator raises a *temporary*
    StopIteration, which ``_MultiProcessingDataLoaderIter._try_put_index`` (torch, ``dataloader.py``) takes as
    "nothing to put now".

    Args:
        source: the global order.
        world_size: number of ranks N.
        prefetch: batches that may be on their way to the training loop: the number of the loader's workers.
    """

    def __init__(self, source: BatchSource, world_size: int, prefetch: int) -> None:
        self._source = source
        self._world_size = world_size
        self._prefetch = max(1, prefetch)
        self._draw: Callable[[], Sequence[int]] | None = None
        self._drawn: deque[int] = deque()
        self._on_their_way: deque[int] = deque()
        self._exhausted = True
        self._allowed = 0

    @property
    def sampler(self) -> Any:
        """The sampler below, for whoever sets its epoch."""
        return getattr(self._source.batches, "sampler", self._source.batches)

    @property
    def batch_size(self) -> int | None:
        """The loader's batch size, if its batch sampler has one."""
        return getattr(self._source.batches, "batch_size", None)

    @property
    def drop_last(self) -> bool:
        """Whether the loader drops an incomplete last batch."""
        return bool(getattr(self._source.batches, "drop_last", False))

    @property
    def global_batches(self) -> int:
        """Batches of the epoch whose order was drawn last, over all ranks."""
        return self._source.drawn

    def __len__(self) -> int:
        """Batches of an epoch *per rank*, as under DDP, so that limits and intervals keep their meaning."""
        return -(-len(self._source) // self._world_size)

    def begin_epoch(self, epoch: int) -> str:
        """Draws the global order of ``epoch``; returns its digest."""
        return self._source.begin_epoch(epoch)

    def open(self, draw: Callable[[], Sequence[int]], ahead: bool = True) -> None:
        """Starts a segment whose tickets come from ``draw``; an empty answer means that it is over.

        Args:
            draw: draws tickets.
            ahead: whether batches may be on their way before the training loop asks for them.
        """
        self._draw = draw
        self._drawn.clear()
        self._on_their_way.clear()
        self._exhausted = False
        self._allowed = self._prefetch if ahead else 0

    def has_next(self) -> bool:
        """Whether this rank has, or can draw, another batch in this segment."""
        return bool(self._on_their_way) or self._draw_ahead()

    def allow_another(self) -> None:
        """Lets one more batch be sent on its way; to be called before the loader is asked for one."""
        self._allowed += 1

    def take_samples(self) -> int:
        """Number of samples of the oldest batch on its way, which the loader has just delivered."""
        indices = self._source[self._on_their_way.popleft()]
        return len(indices) if isinstance(indices, Sequence) else 1

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # `_allowed` counts what may be sent; it keeps a loader's workers from running ahead of the training loop.
        if self._allowed <= 0 or not self._draw_ahead():
            raise StopIteration
        ticket = self._drawn.popleft()
        self._on_their_way.append(ticket)
        self._allowed -= 1
        return self._source[ticket]

    def _draw_ahead(self) -> bool:
        # Outside a segment nothing may be drawn: Lightning calls iter() on the loader during its set-up.
        if not self._drawn and not self._exhausted and self._draw is not None:
            self._drawn.extend(self._draw())
            self._exhausted = not self._drawn
        return bool(self._drawn)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Runs samplers of any make under one seed; leaves the generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def share_loader(loader: DataLoader[Any], world_size: int, seed: int) -> TicketSampler:
    """Makes ``loader`` yield only the batches whose tickets this rank drew, in place; returns the sampler.

    Args:
        loader: a map-style loader whose sampler walks the same order on every rank.
        world_size: number of ranks.
        seed: the seed of the run.
    """
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    current = getattr(loader, name)
    if isinstance(current, TicketSampler):
        return current
    sampler = TicketSampler(BatchSource(current, seed), world_size, prefetch=loader.num_workers)
    # DataLoader.__setattr__ refuses this attribute; building another loader would lose what its subclass keeps.
    object.__setattr__(loader, name, sampler)
    return sampler
