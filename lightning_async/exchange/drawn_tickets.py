"""The tickets that a worker has drawn, from the holder's answer to the push that reports them."""

from __future__ import annotations

from collections import deque

__all__ = ["DrawnTickets"]


class DrawnTickets:
    """A worker's tickets, each in one of three places.

    They *wait* here until the loader asks for them, are *handed on* to the loader until their batch begins, and are
    *unreported* until a push or a skip names them. The loader's batches begin in the order of their tickets.

    Examples:
        >>> tickets = DrawnTickets()
        >>> tickets.add(range(4, 6))
        >>> tickets.hand_on()
        range(4, 6)
        >>> tickets.begin_batch()
        >>> tickets.give_back(1)
        (range(5, 6),)
        >>> tickets.report()
        (range(4, 5),)
    """

    def __init__(self) -> None:
        self._waiting: deque[range] = deque()
        self._handed_on: deque[int] = deque()
        # As (start, stop), in the order of their batches.
        self._unreported: list[tuple[int, int]] = []
        self._over = False

    @property
    def waiting(self) -> int:
        """How many times tickets can be handed on without drawing."""
        return len(self._waiting)

    @property
    def has_unreported(self) -> bool:
        """Whether batches have begun, or were left out, that nothing has reported yet."""
        return bool(self._unreported)

    def begin_epoch(self) -> None:
        """Forgets what is left of an epoch that ends early; the ledger does the same."""
        self._waiting.clear()
        self._handed_on.clear()
        self._unreported.clear()
        self._over = False

    def add(self, drawn: range) -> None:
        """Takes tickets that were drawn; an empty range is nothing."""
        if drawn:
            self._waiting.append(drawn)

    def add_answer(self, drawn: range) -> None:
        """Takes the tickets that a push has asked for; an empty range says that the segment is over."""
        self.add(drawn)
        self._over = not drawn

    def hand_on(self) -> range | None:
        """The next tickets for the loader; empty if the segment is over, None if it is time to draw."""
        if self._waiting:
            tickets = self._waiting.popleft()
            self._handed_on.extend(tickets)
            return tickets
        if self._over:
            self._over = False
            return range(0)
        return None

    def begin_batch(self) -> None:
        """Notes that the batch of the oldest ticket handed on begins.

        Raises:
            RuntimeError: if no ticket is left that was handed on.
        """
        if not self._handed_on:
            raise RuntimeError("a batch begins that no ticket was drawn for; draw one before each batch")
        ticket = self._handed_on.popleft()
        if self._unreported and self._unreported[-1][1] == ticket:
            self._unreported[-1] = (self._unreported[-1][0], ticket + 1)
        else:
            self._unreported.append((ticket, ticket + 1))

    def leave_out(self, count: int) -> None:
        """Notes that the loader leaves out the batches of the oldest tickets handed on: they count as begun."""
        for _ in range(count):
            self.begin_batch()

    def report(self) -> tuple[range, ...]:
        """The tickets of batches that have begun since the last report; from here on they are reported."""
        reported = tuple([range(start, stop) for start, stop in self._unreported])
        self._unreported.clear()
        return reported

    def give_back(self, count: int) -> tuple[range, ...]:
        """Takes the newest tickets from the loader, which has no batches for them; returns them.

        Raises:
            ValueError: if the loader has fewer.
        """
        if count > len(self._handed_on):
            raise ValueError(f"{count} tickets cannot be given back: the loader has {len(self._handed_on)}")
        return as_ranges(sorted(self._handed_on.pop() for _ in range(count)))

    def give_back_waiting(self) -> tuple[range, ...]:
        """Takes the tickets that wait here; returns them."""
        waiting = tuple(self._waiting)
        self._waiting.clear()
        return waiting

    def finish_segment(self) -> None:
        """Forgets that the segment is over."""
        self._over = False


def as_ranges(tickets: list[int]) -> tuple[range, ...]:
    """Tickets in rising order as ranges.

    Examples:
        >>> as_ranges([1, 2, 3, 7])
        (range(1, 4), range(7, 8))
    """
    ranges: list[range] = []
    for ticket in tickets:
        if ranges and ranges[-1].stop == ticket:
            ranges[-1] = range(ranges[-1].start, ticket + 1)
        else:
            ranges.append(range(ticket, ticket + 1))
    return tuple(ranges)
