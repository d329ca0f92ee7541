"""One rank's part in a timeline: spans of its own and, on rank 0, the holder's updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_async.holder.types import Update
from lightning_async.monitoring.spans import Recording, SpanRecorder, UpdateRecorder
from lightning_async.monitoring.trace import write_trace

__all__ = ["Timeline"]


class Timeline:
    """Notes what this rank does, from the hooks of the same names.

    Args:
        limit: the most spans, and updates, of each rank that are kept.
        version: tells the version of the parameters that the module holds.
        ranks: number of ranks, on rank 0, where the holder's updates are noted too; None elsewhere.
    """

    def __init__(self, limit: int, version: Callable[[], int], ranks: int | None) -> None:
        self._spans = SpanRecorder(limit, version)
        self._updates = None if ranks is None else UpdateRecorder(ranks, limit)
        self._ranks = ranks
        self._began_ns = 0

    @property
    def recording(self) -> Recording:
        """What this rank did."""
        return self._spans.recording

    def add(self, name: str, start_ns: int, stop_ns: int) -> None:
        """Notes a span that the worker tells of."""
        self._spans.add(name, start_ns, stop_ns)

    def observe(self, update: Update, tickets: tuple[int, ...]) -> None:
        """Notes an update, on rank 0."""
        assert self._updates is not None
        self._updates.add(update)

    def on_train_batch_start(self, batch: int) -> None:
        """A training step begins."""
        self._spans.begin_batch(time.monotonic_ns(), batch)

    def on_train_batch_end(self) -> None:
        """A training step is over."""
        self._spans.end_batch(time.monotonic_ns())

    def on_validation_start(self) -> None:
        """The ranks have met and validate."""
        self._began_ns = time.monotonic_ns()
        self._spans.interrupt(self._began_ns)

    def on_validation_end(self) -> None:
        """Validation is over."""
        self._spans.recording.add("validation", self._began_ns, time.monotonic_ns())

    def on_train_epoch_end(self) -> None:
        """The ranks have met."""
        self._spans.interrupt(time.monotonic_ns())

    def write(self, path: Path, ranks: Sequence[Recording], configuration: Mapping[str, Any]) -> None:
        """Writes the timeline of all ranks, on rank 0.

        Args:
            path: the file.
            ranks: what each rank did.
            configuration: of the run.
        """
        assert self._updates is not None
        write_trace(path, ranks, self._updates, configuration)

    def write_alone(self, path: Path, configuration: Mapping[str, Any], ended_by: str) -> None:
        """Writes what rank 0 knows when a run breaks off: its own spans, and the updates of all ranks.

        Args:
            path: the file.
            configuration: of the run.
            ended_by: what has ended the run.
        """
        assert self._updates is not None and self._ranks is not None
        others: list[Recording | None] = [None] * (self._ranks - 1)
        write_trace(path, [self.recording, *others], self._updates, configuration, ended_by)
