"""Which phase a run is in: asynchronous (train batches) or synchronous (everything else)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_async.loops.collective_guard import allow_collectives, refuse_collectives

__all__ = ["Phase"]


class Phase:
    """The phase of this process's run; synchronous until the other one is entered.

    Examples:
        >>> phase = Phase()
        >>> with phase.asynchronous():
        ...     phase.is_asynchronous
        True
        >>> phase.is_asynchronous
        False

    Attributes:
        is_asynchronous: whether ranks train asynchronously now. Collectives of user code are errors then.
    """

    def __init__(self) -> None:
        self.is_asynchronous = False

    @contextmanager
    def asynchronous(self) -> Iterator[None]:
        """The asynchronous phase, for as long as the context lasts."""
        self.is_asynchronous = True
        refuse_collectives()
        try:
            yield
        finally:
            self.is_asynchronous = False
            allow_collectives()
