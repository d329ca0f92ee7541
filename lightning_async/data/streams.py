"""A rank's own stream of batches, where ranks cannot share one order: tickets are permits to take its next batch.

Loaders that can be shared have one order (`shared_loader.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["OwnStream", "count_samples"]


class OwnStream:
    """Takes a batch from this rank's stream for each permit that it draws.

    A permit is drawn before the batch is asked for, so no batch is left over when a segment ends. A stream that ends
    first gives back the permits that it has no batches for.

    Args:
        fetch: gives the next batch; raises StopIteration where the stream ends.

    Examples:
        >>> stream, given_back = OwnStream(iter("ab").__next__), []
        >>> stream.open(lambda: range(4), lambda permits, stream_over: given_back.append(permits))
        >>> [stream.take() for _ in range(5) if stream.has_next()], given_back
        (['a', 'b'], [2])
    """

    def __init__(self, fetch: Callable[[], Any]) -> None:
        self._fetch = fetch
        self._draw: Callable[[], Sequence[int]] | None = None
        self._release: Callable[[int, bool], None] | None = None
        self._permits = 0
        self._over = False
        self._fetched: list[Any] = []

    def begin_epoch(self) -> None:
        """Forgets how the last epoch ended."""
        self._permits, self._over = 0, False
        self._fetched.clear()

    def open(self, draw: Callable[[], Sequence[int]], release: Callable[[int, bool], None]) -> None:
        """Starts a segment.

        Args:
            draw: draws permits; an empty answer means that the segment is over.
            release: told, once, how many permits are left when the stream ends, and that it has ended.
        """
        self._draw, self._release = draw, release

    def has_next(self) -> bool:
        """Whether this rank has another batch in this segment; fetches it."""
        if self._fetched:
            return True
        if self._over or self._draw is None or self._release is None:
            return False
        if self._permits == 0:
            self._permits = len(self._draw())
        if self._permits == 0:
            return False
        try:
            self._fetched.append(self._fetch())
        except StopIteration:
            permits, self._permits, self._over = self._permits, 0, True
            self._release(permits, True)
            return False
        return True

    def take(self) -> Any:
        """The batch that `has_next` has fetched."""
        self._permits -= 1
        return self._fetched.pop()


def count_samples(batch: Any) -> int:
    """Number of samples in a batch: the length of the first tensor in it that has one, else 1.

    Examples:
        >>> import torch
        >>> count_samples({"x": [torch.zeros(5, 2), torch.zeros(5)]}), count_samples("text")
        (5, 1)
    """
    return _first_length(batch) or 1


def _first_length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = list(batch)
    elif is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    else:
        return None
    return next((length for length in map(_first_length, parts) if length is not None), None)
