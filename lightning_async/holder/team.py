"""The holder's own threads, which share out what goes over the memory of a large model."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_async.holder import blocks
from lightning_async.runtime.threads import use_one_thread

__all__ = ["Team"]

_T = TypeVar("_T")

# A part of some work, and where its error goes, or None once it is done.
_Part: TypeAlias = Callable[[], object]
_Results: TypeAlias = "queue.SimpleQueue[BaseException | None]"

# How often the caller looks whether the threads that it waits for are alive.
_LOOK_S = 5.0
# How long a thread without work may take to end.
_ENDS_S = 1.0


class Team:
    """Threads that do parts of a piece of work at once; the calling thread is one of them.

    The others start with the first work and end with `close`, or when nobody has the team any more. Parts are taken
    one by one, so that the caller does alone what the others do not come to. One caller at a time.

    Args:
        threads: how many, the caller included.

    Examples:
        >>> team, done = Team(2), []
        >>> team.run([lambda: done.append("a"), lambda: done.append("b"), lambda: done.append("c")])
        >>> sorted(done)
        ['a', 'b', 'c']
        >>> team.close()
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._tasks: queue.SimpleQueue[tuple[_Part, _Results] | None] = queue.SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end, self._tasks, self._helpers)

    def run(self, parts: Sequence[_Part]) -> None:
        """Does all parts, in any order, and returns when the last is done.

        Raises:
            BaseException: the first error of a part, once none of the others is under way.
        """
        if self.threads == 1 or len(parts) == 1 or not self._end.alive:
            for part in parts:
                part()
            return
        self._start()
        results: _Results = queue.SimpleQueue()
        for part in parts:
            self._tasks.put((part, results))
        while (task := _next(self._tasks)) and task[0] is not None:
            _do(*task[0])
        errors = [error for error in (self._wait(results) for _ in parts) if error is not None]
        if errors:
            raise errors[0]

    def over(self, numel: int, act: Callable[[slice], object]) -> None:
        """Has every thread act on a part of what lies in a row, if that is large.

        Args:
            numel: how many numbers there are.
            act: called with each part.
        """
        if self.threads == 1 or numel < blocks.LARGE:
            act(slice(0, numel))
            return
        size = -(-numel // (self.threads * blocks.UNIT)) * blocks.UNIT
        parts = [slice(start, min(start + size, numel)) for start in range(0, numel, size)]
        self.run([partial(act, part) for part in parts])

    def copy(self, out: Tensor, source: Tensor) -> None:
        """Copies what lies in a row."""
        if self.threads == 1:
            out.copy_(source)
        else:
            self.over(out.numel(), lambda part: out[part].copy_(source[part]))

    def close(self) -> None:
        """Ends the threads; what comes later is done by the caller alone. Idempotent."""
        self._end()
        for helper in self._helpers:
            helper.join(_ENDS_S)

    def _start(self) -> None:
        while len(self._helpers) < self.threads - 1:
            helper = threading.Thread(
                target=_help, args=(self._tasks,), name=f"holder-{len(self._helpers) + 1}", daemon=True
            )
            try:
                helper.start()
            except RuntimeError:
                # The process may not have another one; those that there are do its part.
                self.threads = len(self._helpers) + 1
                return
            self._helpers.append(helper)

    def _wait(self, results: _Results) -> BaseException | None:
        while not (result := _next(results, _LOOK_S)):
            dead = [helper.name for helper in self._helpers if not helper.is_alive()]
            if dead:
                return RuntimeError(f"the holder's thread {dead[0]} has ended in the middle of an update")
        return result[0]


def _next(source: queue.SimpleQueue[_T], timeout_s: float = 0.0) -> tuple[_T] | None:
    """What comes next, within a time; None if nothing does."""
    try:
        return (source.get(timeout_s > 0.0, timeout_s),)
    except queue.Empty:
        return None


def _do(part: _Part, results: _Results) -> None:
    try:
        part()
    except BaseException as error:
        # For the caller, who waits for all parts.
        results.put(error)
    else:
        results.put(None)


@torch.no_grad()
def _help(tasks: queue.SimpleQueue[tuple[_Part, _Results] | None]) -> None:
    use_one_thread()
    while (task := tasks.get()) is not None:
        _do(*task)
        # Until the next one it would keep the buffers that this one was about.
        del task


def _end(tasks: queue.SimpleQueue[tuple[_Part, _Results] | None], helpers: Sequence[threading.Thread]) -> None:
    for _ in helpers:
        tasks.put(None)
