"""Learning-rate schedulers that user code steps while the ranks train, on a count that all ranks share.

Under DDP every rank calls ``scheduler.step()`` equally often. Here a fast rank computes more batches and would be ahead
of the others, past a schedule's end. So a call is counted and not made; every rank makes a step for each N calls that
all of them together have counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_async.holder.tally import Tally
from lightning_async.loops.phase import Phase

__all__ = ["SharedSchedulers", "schedulers_in"]


class SharedSchedulers:
    """Schedulers whose steps in the asynchronous phase follow the calls of all ranks.

    A call that says where the schedule is to be (``step(epoch)``) is made as it is: it counts nothing.

    Args:
        world_size: number of ranks N.
        first: the place in the tally of the first scheduler's calls.
        phase: the run's phase.
    """

    def __init__(self, world_size: int, first: int, phase: Phase) -> None:
        self._phase = phase
        self._world_size = world_size
        self._first = first
        self._schedulers: list[Any] = []
        self._made: list[int] = []
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._inside = False
        self.tally: Tally | None = None

    def __len__(self) -> int:
        return len(self._schedulers)

    @property
    def made(self) -> list[int]:
        """Steps that each scheduler has made for calls of the asynchronous phase."""
        return list(self._made)

    @made.setter
    def made(self, made: Iterable[int]) -> None:
        self._made = [*made]

    @property
    def plateaus(self) -> list[Any]:
        """Those that step by a metric, of which each rank knows another value, and have stepped so."""
        return [
            scheduler
            for place, scheduler in enumerate(self._schedulers)
            if isinstance(scheduler, ReduceLROnPlateau) and self._made[place]
        ]

    def share(self, schedulers: Iterable[Any]) -> None:
        """Takes over schedulers that it does not have yet."""
        known = set(map(id, self._schedulers))
        for scheduler in schedulers:
            if id(scheduler) not in known:
                known.add(id(scheduler))
                place = len(self._schedulers)
                self._schedulers.append(scheduler)
                self._arguments.append(((), {}))
                if place == len(self._made):
                    self._made.append(0)
                _count_steps(scheduler, lambda *a, place=place, **k: self._called(place, *a, **k))

    def release(self) -> None:
        """Gives the schedulers their own ``step`` again."""
        for scheduler in self._schedulers:
            scheduler.__class__ = type(scheduler).__mro__[1]
        self._schedulers.clear()

    def catch_up(self) -> None:
        """Makes the steps that are due."""
        if self.tally is None:
            return
        for place, scheduler in enumerate(self._schedulers):
            due = self.tally.known(self._first + place) // self._world_size
            arguments, keywords = self._arguments[place]
            if isinstance(scheduler, ReduceLROnPlateau) and not (arguments or keywords):
                # This rank knows no value of the metric yet.
                continue
            while self._made[place] < due:
                self._made[place] += 1
                self._make(place, arguments, keywords)

    def _called(self, place: int, *arguments: Any, **keywords: Any) -> None:
        by_count = isinstance(self._schedulers[place], ReduceLROnPlateau) or not (arguments or keywords)
        if not self._phase.is_asynchronous or self._inside or not by_count or self.tally is None:
            self._make(place, arguments, keywords)
            return
        self._arguments[place] = arguments, keywords
        self.tally.add(self._first + place)
        self.catch_up()

    def _make(self, place: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # A scheduler of schedulers steps those that it has, which may be shared too.
        before, self._inside = self._inside, True
        try:
            scheduler: Any = self._schedulers[place]
            kind: Any = type(scheduler).__mro__[1]
            kind.step(scheduler, *arguments, **keywords)
        finally:
            self._inside = before


def _count_steps(scheduler: Any, called: Callable[..., None]) -> None:
    kind = type(scheduler)

    def step(self: Any, *arguments: Any, **keywords: Any) -> None:
        called(*arguments, **keywords)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        # A copy is one of the scheduler as the user made it.
        _, _, *state = super(type(self), self).__reduce_ex__(protocol)
        return _make_empty, (kind,), *state

    # A class and not an attribute: torch saves a scheduler's attributes as its state.
    names = {"step": step, "__reduce_ex__": reduce_ex, "__module__": kind.__module__, "__doc__": kind.__doc__}
    scheduler.__class__ = type(kind.__name__, (kind,), names)


def _make_empty(kind: type) -> Any:
    return object.__new__(kind)


def schedulers_in(values: Mapping[str, Any], optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Any]:
    """The schedulers of some optimizers among an object's attributes, and in lists and dicts there."""
    own = set(map(id, optimizers))
    for value in values.values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, LRScheduler) and id(getattr(part.optimizer, "optimizer", part.optimizer)) in own:
                yield part
