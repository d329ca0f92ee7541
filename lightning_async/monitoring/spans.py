"""What one rank did when, and what the holder did, kept in little memory.

Times are those of the monotonic clock, in nanoseconds, which all processes of one host share; `Recording.offset_ns`
relates them to the time of day, and so to other hosts.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_async.holder.types import Update

__all__ = ["NAMES", "AppliedUpdate", "Recording", "Span", "SpanRecorder", "UpdateRecorder"]

# What a rank does: draws its next ticket and fetches the batch; computes; hands a gradient in; waits; takes parameters.
# Then, at a validation or an epoch's end, waits for the other ranks; validates; and, on rank 0, saves a checkpoint.
NAMES = ("draw", "data", "compute", "push", "wait", "pull", "sync", "validation", "checkpoint")
_CODES = {name: code for code, name in enumerate(NAMES)}
# A shorter time in which the barrier held a gradient back is the time to look.
_LEAST_PARKED_NS = 20_000


class Span(NamedTuple):
    """Something that took its time.

    Args:
        name: one of `NAMES`.
        start_ns: by the time of day.
        stop_ns: by the time of day.
        batch: this rank's count of batches within the epoch; None where it is about no batch.
        version: of the parameters that were computed with, or have been taken; None where it is about none.
    """

    name: str
    start_ns: int
    stop_ns: int
    batch: int | None = None
    version: int | None = None


@dataclass
class Recording:
    """Spans, as one rank's process noted them; small enough to travel.

    Args:
        offset_ns: time of day less monotonic clock.
        limit: the most spans that are kept.
        full_at_ns: when the first span was left out; None if none was.
        left_out: how many were.
    """

    offset_ns: int
    limit: int
    codes: array[int] = field(default_factory=lambda: array("B"))
    starts_ns: array[int] = field(default_factory=lambda: array("q"))
    stops_ns: array[int] = field(default_factory=lambda: array("q"))
    # -1 for none.
    batches: array[int] = field(default_factory=lambda: array("i"))
    versions: array[int] = field(default_factory=lambda: array("q"))
    full_at_ns: int | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.codes)

    def add(self, name: str, start_ns: int, stop_ns: int, batch: int | None = None, version: int | None = None) -> None:
        """Keeps a span while there is room."""
        if len(self.codes) >= self.limit:
            self.full_at_ns = self.full_at_ns or start_ns
            self.left_out += 1
            return
        self.codes.append(_CODES[name])
        self.starts_ns.append(start_ns)
        self.stops_ns.append(stop_ns)
        self.batches.append(-1 if batch is None else batch)
        self.versions.append(-1 if version is None else version)

    def spans(self) -> Iterator[Span]:
        """All spans in the order in which they began; one that lies in another comes after it."""
        starts, stops, offset = self.starts_ns, self.stops_ns, self.offset_ns
        for at in sorted(range(len(self)), key=lambda at: (starts[at], -stops[at])):
            batch, version = self.batches[at], self.versions[at]
            yield Span(
                NAMES[self.codes[at]],
                starts[at] + offset,
                stops[at] + offset,
                None if batch < 0 else batch,
                None if version < 0 else version,
            )


class SpanRecorder:
    """Turns what a rank's worker and training loop report into spans that nest.

    Args:
        limit: the most spans that are kept; later ones are only counted.
        version: tells the version of the parameters that the module holds.

    Examples:
        >>> recorder = SpanRecorder(limit=10, version=lambda: 7)
        >>> recorder.begin_batch(1_000, batch=3)
        >>> recorder.add("push", 5_000, 6_000)
        >>> [(span.name, span.batch, span.version) for span in recorder.recording.spans()]
        [('compute', 3, 7), ('push', 3, 7)]
    """

    def __init__(self, limit: int, version: Callable[[], int]) -> None:
        self.recording = Recording(offset_ns=time.time_ns() - time.monotonic_ns(), limit=limit)
        self._tell_version = version
        self._batch: int | None = None
        self._version = 0
        self._computing_since: int | None = None
        self._idle_since: int | None = None
        self._pushed = False

    def add(self, name: str, start_ns: int, stop_ns: int) -> None:
        """A span of the worker's; it ends a computation and, once parameters are here, the next one may begin."""
        if self._computing_since is not None and name in ("push", "wait", "pull"):
            self.recording.add("compute", self._computing_since, start_ns, self._batch, self._version)
            self._pushed = True
            self._computing_since = None
        if name == "push":
            self.recording.add(name, start_ns, stop_ns, self._batch, self._version)
        elif name == "pull":
            self._version = self._tell_version()
            self.recording.add(name, start_ns, stop_ns, version=self._version)
        else:
            self.recording.add(name, start_ns, stop_ns)
        if name == "pull" and self._pushed:
            # With several optimizers a batch goes on computing.
            self._computing_since = stop_ns

    def begin_batch(self, now_ns: int, batch: int) -> None:
        """The training step begins: its batch is here.

        Args:
            now_ns: the time.
            batch: which of this rank's batches in the epoch it is.
        """
        if self._idle_since is not None:
            self.recording.add("data", self._idle_since, now_ns, batch)
        self._computing_since, self._pushed, self._idle_since = now_ns, False, None
        self._batch, self._version = batch, self._tell_version()

    def end_batch(self, now_ns: int) -> None:
        """The training step is over."""
        if self._computing_since is not None and not self._pushed:
            # A micro-batch of several, or one that gave no gradient.
            self.recording.add("compute", self._computing_since, now_ns, self._batch, self._version)
        self._computing_since, self._pushed, self._idle_since = None, False, now_ns

    def interrupt(self, now_ns: int) -> None:
        """What comes now is not training: all ranks have met."""
        if self._idle_since is not None:
            self.recording.add("sync", self._idle_since, now_ns)
        self._idle_since = None


class AppliedUpdate(NamedTuple):
    """What became of a push at the holder.

    Args:
        worker: whose push it was.
        start_ns: when the update began, by the time of day.
        stop_ns: when it was done.
        parked_ns: how long the barrier had held it back before; 0 if it had not.
        version_read: version of the parameters that the gradient was computed at.
        version: the holder's version after it.
        staleness: updates between.
        applied: False if it was dropped as too stale, or rejected.
        rejected: True if it was rejected.
    """

    worker: int
    start_ns: int
    stop_ns: int
    parked_ns: int
    version_read: int
    version: int
    staleness: int
    applied: bool
    rejected: bool = False


class UpdateRecorder:
    """Rank 0's notes of each update: whose, when, how stale, how long parked.

    Args:
        workers: number of ranks.
        limit: the most updates of each rank that are kept.
    """

    def __init__(self, workers: int, limit: int) -> None:
        self._limit = limit
        self._kept = [0] * workers
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._workers = array("i")
        self._applied = array("b")
        self._rejected = array("b")
        self._numbers = [array("q") for _ in range(6)]
        self._lock = threading.Lock()

    def add(self, update: Update) -> None:
        """Notes an update that was applied, dropped or rejected; quick, since the holder waits."""
        push = update.push
        parked_ns = int(update.parked_s * 1e9)
        numbers = (
            update.at_ns - update.took_ns,
            update.at_ns,
            parked_ns if parked_ns > _LEAST_PARKED_NS else 0,
            push.version_read,
            update.version,
            update.staleness,
        )
        with self._lock:
            if self._kept[push.worker] >= self._limit:
                return
            self._kept[push.worker] += 1
            self._workers.append(push.worker)
            self._applied.append(update.applied)
            self._rejected.append(update.rejected)
            for kept, number in zip(self._numbers, numbers, strict=True):
                kept.append(number)

    def updates(self) -> Iterator[AppliedUpdate]:
        """The updates in the order in which they began."""
        with self._lock:
            count = len(self._workers)
        starts, stops, parked, read, versions, staleness = self._numbers
        for at in sorted(range(count), key=lambda at: starts[at]):
            yield AppliedUpdate(
                self._workers[at],
                starts[at] + self._offset_ns,
                stops[at] + self._offset_ns,
                parked[at],
                read[at],
                versions[at],
                staleness[at],
                bool(self._applied[at]),
                bool(self._rejected[at]),
            )
