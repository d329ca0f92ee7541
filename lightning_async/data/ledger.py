"""Hand-out of batches: the ledger on rank 0.

A ticket is a position in the epoch's one global order of batches (`orders.py`). The ledger says who may compute which
ticket and which are applied; a rank's `ticket_feed.py` turns the tickets that it drew into the indices of samples.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from lightning_async.data.ranges import UNBOUNDED, RangeSet, TicketQueue

__all__ = ["Batches", "Ledger"]

Batches: TypeAlias = Literal["shared", "sharded"]


class Ledger:
    """Who may compute which ticket of this epoch, and which tickets are applied; a monitor on rank 0.

    An epoch is cut into segments (training between two validations). A segment hands out a number of tickets and is
    over when they are gone, or when someone closes it; tickets that were not handed out stay for the next segment.

    With ``batches="shared"`` a worker that asks gets the next ticket. With ``"sharded"`` ticket ``t`` belongs to worker
    ``(t // block) mod N``, so every worker gets an equal share.

    Args:
        workers: number of workers N.
        batches: the dispatch rule.

    Examples:
        >>> ledger = Ledger(workers=2, batches="shared")
        >>> ledger.begin_epoch(range(3))
        >>> ledger.open(3)
        >>> [list(ledger.draw(worker)) for worker in (0, 1, 0, 1)]
        [[0], [1], [2], []]
    """

    def __init__(self, workers: int, batches: Batches = "shared") -> None:
        self._lock = threading.Lock()
        self._workers = workers
        self._batches = batches
        self._block = 1
        self._stop = 0
        self._queues = [TicketQueue([])]
        self._allowance = [0]
        self._closed = False
        self._leased: dict[int, set[int]] = {worker: set() for worker in range(workers)}
        self._gone: set[int] = set()
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
            self._without_batch = self._leased.keys() - self._gone
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

    def deal(self, batches: Batches) -> None:
        """Deals what is left of the epoch, and every later one, by another rule, while nobody has a ticket."""
        with self._lock:
            self._batches = batches
            self._deal(self._block, 1 if batches == "shared" else self._workers)
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
            drawn = self._draw_from(worker % len(self._queues), worker)
            if not drawn and self._gone:
                # The shares of workers that were taken out of the run are for whoever has finished its own.
                for share in self._shares_without_owner():
                    if drawn := self._draw_from(share, worker):
                        break
            return drawn

    def evict(self, worker: int) -> int:
        """Takes a worker out of the run; returns how many tickets it was handed and others get now, first of all.

        With equal shares its own goes to the others. Idempotent.
        """
        with self._lock:
            self._gone.add(worker)
            self._without_batch.discard(worker)
            returned = self._requeue(worker)
            for share in range(len(self._queues)):
                self._clear_if_nobody_draws(share)
            return returned

    def admit(self, worker: int) -> None:
        """Lets a worker draw that was evicted, or that was not there when the run began."""
        with self._lock:
            self._gone.discard(worker)
            self._over.discard(worker)
            self._leased.setdefault(worker, set())

    def complete(self, worker: int, tickets: Sequence[range]) -> tuple[int, ...]:
        """Marks tickets that ``worker`` was handed as applied; returns them one by one.

        Raises:
            ValueError: if it does not hold one of them; then nothing is marked.
        """
        with self._lock:
            done = self._held(worker, tickets, "reports")
            self._leased[worker].difference_update(done)
            for of_range in tickets:
                self._applied.add(of_range.start, of_range.stop)
            return done

    def check(self, worker: int, tickets: Sequence[range]) -> None:
        """Raises what `complete` would raise, for a push that is looked at before its gradient is applied."""
        with self._lock:
            self._held(worker, tickets, "reports")

    def release(self, worker: int, tickets: Sequence[range], stream_over: bool) -> None:
        """Takes back tickets that ``worker`` was handed and has no batches for.

        Args:
            worker: the worker.
            tickets: which ones.
            stream_over: the worker's own stream has ended: it gets nothing more in this epoch.

        Raises:
            ValueError: if it does not hold one of them; then nothing is taken back.
        """
        with self._lock:
            released = self._held(worker, tickets, "gives back")
            self._leased[worker].difference_update(released)
            self._put_back(released)
            if stream_over:
                self._over.add(worker)
                self._without_batch.discard(worker)
            self._clear_if_nobody_draws(worker % len(self._queues))

    def leased(self, worker: int) -> int:
        """Number of tickets handed to ``worker`` and not applied."""
        with self._lock:
            return len(self._leased[worker])

    def requeue(self, worker: int) -> int:
        """Takes back what ``worker`` was handed and has not finished, to be handed out first; returns how many."""
        with self._lock:
            return self._requeue(worker)

    def unfinished(self) -> int:
        """Number of tickets of this epoch that are not applied: handed out, or still to be."""
        with self._lock:
            return sum(queue.count for queue in self._queues) + sum(map(len, self._leased.values()))

    def progress(self) -> tuple[int, int]:
        """``(applied, not yet handed out)``: how many tickets of this epoch, what it was resumed with included."""
        with self._lock:
            return len(self._applied), sum(queue.count for queue in self._queues)

    def applied(self) -> list[tuple[int, int]]:
        """The tickets of this epoch that are applied, as ``(start, stop)`` in rising order."""
        with self._lock:
            return self._applied.pairs()

    def _draw_from(self, share: int, worker: int) -> range:
        allowance = self._allowance[share]
        if len(self._queues) == 1 and self._without_batch and worker not in self._without_batch:
            allowance -= len(self._without_batch) * self._block
            if allowance < self._block:
                # A part of a block would make two updates of one.
                return range(0)
        drawn = self._queues[share].take(allowance)
        if drawn:
            self._allowance[share] -= len(drawn)
            self._leased[worker].update(drawn)
            self._without_batch.discard(worker)
        return drawn

    def _requeue(self, worker: int) -> int:
        leased = self._leased[worker]
        count = len(leased)
        self._put_back(leased)
        leased.clear()
        return count

    def _owners(self, share: int) -> set[int]:
        """The workers in the run that a share belongs to."""
        return {worker for worker in self._leased if worker % len(self._queues) == share} - self._gone

    def _shares_without_owner(self) -> list[int]:
        return [share for share in range(len(self._queues)) if not self._owners(share)]

    def _held(self, worker: int, tickets: Sequence[range], verb: str) -> tuple[int, ...]:
        """The tickets one by one, if ``worker`` holds each of them and names it once."""
        leased = self._leased[worker]
        if len(tickets) == 1 and len(tickets[0]) == 1 and (ticket := tickets[0].start) in leased:
            # The usual case.
            return (ticket,)
        count = sum(map(len, tickets))
        if count > len(leased):
            # Before they are made one by one: a range may be of any length.
            raise ValueError(f"worker {worker} {verb} {count} batches but holds {len(leased)}")
        each = tuple([ticket for of_range in tickets for ticket in of_range])
        if not leased.issuperset(each):
            foreign = next(ticket for ticket in each if ticket not in leased)
            raise ValueError(f"worker {worker} {verb} batch {foreign}, which it does not hold")
        if len(set(each)) < count:
            raise ValueError(f"worker {worker} {verb} a batch twice")
        return each

    def _deal(self, block: int, shares: int) -> None:
        self._block = block
        left = self._applied.missing(self._stop)
        self._queues = [TicketQueue(left, block, share, shares) for share in range(shares)]
        self._allowance = [0] * shares

    def _clear_if_nobody_draws(self, share: int) -> None:
        if self._over.issuperset(self._owners(share) or self._leased.keys() - self._gone):
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
