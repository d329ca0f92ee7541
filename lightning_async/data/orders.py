"""An epoch's global order of batches, drawn from the user's sampler, and its digest.

Tickets are positions in this order.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler

__all__ = ["BatchSource", "SeededGenerators", "walk"]

# Samples whose order is drawn at once. Nearly every epoch is complete then; a longer one, or one without end, is drawn
# further as it is trained on.
_SAMPLES_AHEAD = 1 << 22
# Batches that are drawn further at once. Digests are compared at multiples of it.
_STRIDE = 1024


class BatchSource:
    """The epoch's global order of batches, the same on every rank.

    Args:
        batches: the loader's batch sampler (or its sampler, where the loader does not batch).
        seed: the seed of the run. Samplers that draw from a global generator (Python's, NumPy's, torch's) are run
            under ``seed + epoch``, so that all ranks walk the same order.
        shares_rest: whether a last batch of a single sample gets half of the batch before it: no rank would have such
            a batch under DDP, and layers such as BatchNorm refuse it.

    Examples:
        >>> source = BatchSource([[0, 1], [2, 3], [4]], seed=0)
        >>> order = source.begin_epoch(0)
        >>> source.drawn, source[2], source.matches(order)
        (3, [4], True)
    """

    def __init__(self, batches: Any, seed: int, shares_rest: bool = False) -> None:
        self.batches = batches
        self._seed = seed
        self._epoch = 0
        self._shares_rest = shares_rest
        self._order: list[Any] | None = None
        self._end: int | None = None
        self._bound: int | None = None
        self._walk: Iterator[Any] = iter(())
        self._generators = SeededGenerators(seed)
        self._hash = hashlib.blake2b(digest_size=16)
        self._digests: list[str] = []

    def __len__(self) -> int:
        """Batches of an epoch, as their sampler says; Lightning's limits and intervals are made from it."""
        return len(self.batches)

    @property
    def seed(self) -> int:
        """What samplers run under in the epoch that was begun last."""
        return self._seed + self._epoch

    @property
    def drawn(self) -> int:
        """Batches of the epoch whose order was drawn; what the sampler says, as long as its end is not reached.

        A sampler that fills its batches by length, for instance, may only estimate how many there are. As under DDP,
        an epoch ends where its batches do, and no later than it says.
        """
        if self._order is not None and self._end is not None:
            return self._end
        return len(self)

    @property
    def is_complete(self) -> bool:
        """Whether the order is drawn to its end."""
        return self._end is not None

    @property
    def digests(self) -> list[str]:
        """Digests of what is drawn so far, at the same positions on every rank."""
        return list(self._digests)

    def begin_epoch(self, epoch: int, limit: int | None = None) -> str:
        """Draws the order of ``epoch`` and returns its digest: two orders are the same if their digests are.

        Args:
            epoch: number of the epoch.
            limit: batches that the epoch has at most.
        """
        try:
            length: int | None = len(self)
        except TypeError:
            length = None
        bounds = [bound for bound in (length, limit) if bound is not None]
        self._bound = min(bounds) if bounds else None
        self._order, self._end, self._digests = [], None, []
        self._hash = hashlib.blake2b(digest_size=16)
        self._epoch = epoch
        self._generators = SeededGenerators(self.seed)
        with self._generators:
            self._walk = iter(self.batches)
        samples = 0
        while self._end is None and samples < _SAMPLES_AHEAD:
            samples += sum(map(count_indices, self._extend()))
        self._share_rest()
        self._digest(self._order)
        return f"{len(self._order)}:{self._digests[-1]}"

    def has(self, ticket: int) -> bool:
        """Whether the order has a batch at this position; draws further if it must."""
        assert self._order is not None
        while self._end is None and ticket >= len(self._order):
            self._digest(self._extend())
        return ticket < len(self._order)

    def matches(self, order: str) -> bool:
        """Whether an order that was drawn earlier, of which this is the digest, is this one.

        Where less of that one was drawn, since the epoch was limited otherwise, it must be the beginning of this one.
        """
        count, _, digest = order.partition(":")
        if not count.isdecimal() or (int(count) and not self.has(int(count) - 1)):
            return False
        found = hashlib.blake2b(digest_size=16)
        assert self._order is not None
        for batch in self._order[: int(count)]:
            found.update(_encoded(batch))
        return found.hexdigest() == digest

    def __getitem__(self, ticket: int) -> Any:
        assert self._order is not None
        return self._order[ticket]

    def _extend(self) -> list[Any]:
        """Draws some batches more, or finds the end; returns them."""
        assert self._order is not None
        begin = len(self._order)
        stop = begin + _STRIDE
        if self._bound is not None:
            stop = min(stop, self._bound)
        with self._generators:
            self._order.extend(islice(self._walk, stop - begin))
        if len(self._order) < stop or stop == self._bound:
            self._end = len(self._order)
            self._walk = iter(())
        return self._order[begin:]

    def _digest(self, batches: Iterable[Any]) -> None:
        for batch in batches:
            self._hash.update(_encoded(batch))
        self._digests.append(self._hash.hexdigest())

    def _share_rest(self) -> None:
        """Splits the last two batches anew where the last one has a single sample."""
        order, size = self._order, getattr(self.batches, "batch_size", None)
        assert order is not None
        plain = getattr(type(self.batches), "__iter__", None) is BatchSampler.__iter__
        if not (self._shares_rest and plain and self.is_complete and len(order) > 1):
            return
        if len(order[-1]) == 1 and len(order[-2]) == size and size > 2:
            both = order[-2] + order[-1]
            half = -(-len(both) // 2)
            order[-2:] = [both[:half], both[half:]]


class SeededGenerators:
    """The global generators' states of one walk through a sampler, put in place while it is drawn from.

    Samplers of any make run under one seed, from one drawing to the next, and the generators of the program stay as
    they were.

    Args:
        seed: of all generators.
    """

    def __init__(self, seed: int) -> None:
        python, numpy = random.Random(seed), np.random.RandomState(seed % (1 << 32))
        torch_generator = torch.Generator().manual_seed(seed)
        self._inside: tuple[Any, Any, Any] = (
            python.getstate(),
            numpy.get_state(),
            torch_generator.get_state(),
        )
        self._outside = self._inside

    def __enter__(self) -> None:
        self._outside = _states()
        _set_states(self._inside)

    def __exit__(self, *exception: object) -> None:
        self._inside = _states()
        _set_states(self._outside)


def walk(batches: Any, seed: int, limit: int | None = None) -> list[Any]:
    """What a sampler yields in one pass, without a trace: its generators, and the program's, stay as they were.

    Args:
        batches: a sampler, or a batch sampler.
        seed: of the program's generators meanwhile.
        limit: how much of it, at most.
    """
    own = [part for part in _parts(batches) if isinstance(part, torch.Generator)]
    states = [generator.get_state() for generator in own]
    try:
        with SeededGenerators(seed):
            return list(islice(batches, limit))
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


def count_indices(batch: Any) -> int:
    """Number of samples that a batch of a sampler names."""
    try:
        return len(batch) if not isinstance(batch, str | bytes) else 1
    except TypeError:
        return 1


def _parts(sampler: Any, depth: int = 4) -> Iterator[Any]:
    """The values of a sampler's attributes, and of the samplers in it."""
    for value in vars(sampler).values() if hasattr(sampler, "__dict__") else ():
        yield value
        if depth and hasattr(value, "__iter__") and not isinstance(value, torch.Tensor | Sequence):
            yield from _parts(value, depth - 1)


def _states() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state()


def _set_states(states: tuple[Any, Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.random.set_rng_state(states[2])


def _encoded(batch: Any) -> bytes:
    """A batch's value in bytes: equal values are equal, whether they are ints of Python, NumPy or torch."""
    if hasattr(batch, "tolist"):
        batch = batch.tolist()
    if isinstance(batch, list | tuple):
        try:
            packed = array("q", batch).tobytes()
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            return b"q%d:" % len(batch) + packed
    return b"v" + _value(batch) + b";"


def _value(value: Any) -> bytes:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, int):
        return b"%d" % int(value)
    if isinstance(value, Mapping):
        return _sequence(b"m", sorted(_value(key) + b"=" + _value(part) for key, part in value.items()))
    if isinstance(value, Set):
        return _sequence(b"s", sorted(map(_value, value)))
    if isinstance(value, Iterable) and isinstance(value, list | tuple | range):
        return _sequence(b"l", map(_value, value))
    if is_dataclass(value) and not isinstance(value, type):
        return _sequence(b"d", (_value(getattr(value, field.name)) for field in fields(value)))
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__)).encode()
    if getattr(type(value), "__repr__", None) == object.__repr__:
        # Its text would be its address, which is another one in each process.
        return type(value).__qualname__.encode() + _value(getattr(value, "__dict__", {}))
    return repr(value).encode()


def _sequence(kind: bytes, parts: Iterable[bytes]) -> bytes:
    return kind + b"[" + b",".join(parts) + b"]"
