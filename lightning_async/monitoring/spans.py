"""What one rank did when, kept in little memory.

Times are those of the monotonic clock, in nanoseconds, which all processes of one host share; `Recording.offset_ns`
relates them to the time of day, and so to other hosts.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["NAMES", "Recording", "SpanRecorder", "StalenessRecorder"]

# What a rank does: draws its next ticket and fetches the batch; computes; hands a gradient in; waits; takes parameters.
# And, at a validation or an epoch's end, waits for the other ranks.
NAMES = ("draw", "data", "compute", "push", "wait", "pull", "sync", "parked")
_CODES = {name: code for code, name in enumerate(NAMES)}


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
    full_at_ns: int | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.codes)

    def add(self, name: str, start_ns: int, stop_ns: int) -> None:
        """Keeps a span while there is room."""
        if len(self.codes) >= self.limit:
            self.full_at_ns = self.full_at_ns or start_ns
            self.left_out += 1
            return
        self.codes.append(_CODES[name])
        self.starts_ns.append(start_ns)
        self.stops_ns.append(stop_ns)

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Each span's name, start and stop, by the time of day in nanoseconds."""
        for code, start, stop in zip(self.codes, self.starts_ns, self.stops_ns, strict=True):
            yield NAMES[code], start + self.offset_ns, stop + self.offset_ns


class SpanRecorder:
    """Turns what a rank's worker and training loop report into spans that nest.

    Args:
        limit: the most spans that are kept; later ones are only counted.

    Examples:
        >>> recorder = SpanRecorder(limit=10)
        >>> recorder.begin_batch(1_000)
        >>> recorder.add("push", 5_000, 6_000)
        >>> [name for name, _, _ in recorder.recording.spans()]
        ['compute', 'push']
    """

    def __init__(self, limit: int) -> None:
        self.recording = Recording(offset_ns=time.time_ns() - time.monotonic_ns(), limit=limit)
        self._computing_since: int | None = None
        self._idle_since: int | None = None
        self._pushed = False

    def add(self, name: str, start_ns: int, stop_ns: int) -> None:
        """A span of the worker's; it ends a computation and, once parameters are here, the next one may begin."""
        if self._computing_since is not None and name != "draw":
            self.recording.add("compute", self._computing_since, start_ns)
            self._pushed = True
            self._computing_since = None
        self.recording.add(name, start_ns, stop_ns)
        if name == "pull" and self._pushed:
            # With several optimizers a batch goes on computing.
            self._computing_since = stop_ns

    def begin_batch(self, now_ns: int) -> None:
        """The training step begins: its batch is here."""
        if self._idle_since is not None:
            self.recording.add("data", self._idle_since, now_ns)
        self._computing_since, self._pushed, self._idle_since = now_ns, False, None

    def end_batch(self, now_ns: int) -> None:
        """The training step is over."""
        if self._computing_since is not None and not self._pushed:
            # A micro-batch of several, or one that gave no gradient.
            self.recording.add("compute", self._computing_since, now_ns)
        self._computing_since, self._pushed, self._idle_since = None, False, now_ns

    def interrupt(self, now_ns: int) -> None:
        """What comes now is not training: all ranks have met."""
        if self._idle_since is not None:
            self.recording.add("sync", self._idle_since, now_ns)
        self._idle_since = None


class StalenessRecorder:
    """Rank 0's notes of each update: whose, how stale, how long parked.

    Args:
        workers: number of ranks.
        limit: the most updates of each rank that are kept.
    """

    def __init__(self, workers: int, limit: int) -> None:
        self.limit = limit
        self.times_ns = [array("q") for _ in range(workers)]
        self.staleness = [array("l") for _ in range(workers)]
        offset = time.time_ns() - time.monotonic_ns()
        self.parked = [Recording(offset_ns=offset, limit=limit) for _ in range(workers)]
        self._offset_ns = offset
        self._lock = threading.Lock()

    def add(self, worker: int, staleness: int, parked_s: float, applied: bool, now_ns: int) -> None:
        """Notes an update that was applied or dropped at ``now_ns`` of the monotonic clock."""
        with self._lock:
            if parked_s > 2e-5:  # less is the time to look
                self.parked[worker].add("parked", now_ns - int(parked_s * 1e9), now_ns)
            if applied and len(self.times_ns[worker]) < self.limit:
                self.times_ns[worker].append(now_ns + self._offset_ns)
                self.staleness[worker].append(staleness)
