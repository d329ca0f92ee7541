"""Snapshots of a run, written while it trains, and found by the job that is started again."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async.exchange.service import Service
from lightning_async.loops.progress_bar import say
from lightning_async.loops.protocols import Collectives
from lightning_async.runtime.job import Job
from lightning_async.strategies.checkpointing import CHECKPOINT_KEY
from lightning_async.strategies.frozen import frozen_copy
from lightning_async.strategies.snapshot_file import SnapshotFile
from lightning_async.strategies.snapshot_writer import SnapshotWriter
from lightning_async.strategies.start_choice import SNAPSHOT_KEY, StartChoice

__all__ = ["SnapshotPlace", "Snapshots"]

# How many fits of this script have had their snapshots at a place.
_fits: Counter[Path] = Counter()


class Snapshots:
    """One fit's snapshots: ordinary checkpoints, taken on rank 0 between two of its batches.

    Args:
        trainer: the trainer.
        path: where they are, one in the place of the other; those of a script's further fits are beside it.
        every_s: seconds from one to the next.
        collectives: the strategy's own.
        joins: whether this rank joins a run that is under way.
        job: of this process.
        fit: number of the fit, among those of the script that have their snapshots there; None counts it.

    Attributes:
        start: chooses where the fit begins.
    """

    def __init__(
        self,
        trainer: Trainer,
        path: Path,
        every_s: float,
        collectives: Collectives,
        joins: Callable[[], bool],
        job: Job | None = None,
        fit: int | None = None,
    ) -> None:
        self._trainer = trainer
        self._every_s = every_s
        path = path.absolute()
        fit = _count_fit(path) if fit is None else fit
        self._file = SnapshotFile(path if fit == 1 else path.with_name(f"{path.stem}.fit{fit}{path.suffix}"))
        self._writer = SnapshotWriter(self._file)
        job = Job.of_environment() if job is None else job
        self.start = StartChoice(trainer, self._file, collectives, joins, job)
        # What the segment is called that the holder's own process leaves its state of; empty without such a process.
        self._segment = ""
        self._service: Service | None = None
        # The segment of the snapshot that is being written, until its process is told that it is there.
        self._untold = ""
        self._next = time.monotonic() + every_s
        self._is_broken = False
        self.is_taking = False

    def begin_segment(self, service: Service) -> None:
        """The ranks are about to part; a process of the holder's own leaves its state if rank 0 is lost meanwhile.

        Args:
            service: the holder's side.
        """
        name = uuid.uuid4().hex
        self._segment = name if service.save_on_loss(str(self._file.path), name) else ""
        self._service = service
        if self._segment:
            # What it leaves belongs to a snapshot of the same segment. Short ones of a large model go without.
            self._next = min(self._next, max(time.monotonic(), self._writer.rests_until_s))

    def take_if_due(self) -> None:
        """Takes a snapshot, on rank 0 between two batches, if one is due and none is being written; no collective."""
        # What has ended has noted whether it went well.
        is_busy = self._writer.is_busy
        self._tell_holder()
        if time.monotonic() < self._next or is_busy or self._is_broken:
            return
        self._next = time.monotonic() + self._every_s
        self._say_lines()
        self.is_taking = True
        try:
            # As any other: with all that user code adds. `write` is called with what it has come to.
            self._trainer.save_checkpoint(self._file.path, weights_only=False)
        finally:
            self.is_taking = False

    def end_segment(self) -> None:
        """The ranks meet again."""
        self._tell_holder()

    def write(
        self, checkpoint: dict[str, Any], owned: Collection[int], step: int, held: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint in the background.

        Args:
            checkpoint: is complete.
            owned: the identities of tensors in it that nobody else has.
            step: of the shared clock.
            held: where it has what the holder holds; see `Checkpointing.held`.
        """
        checkpoint[CHECKPOINT_KEY][SNAPSHOT_KEY] = {
            **self.start.note(),
            "epoch": checkpoint["epoch"],
            "step": step,
            "written": time.time(),
            "segment": self._segment,
            **(held or {}),
        }
        try:
            frozen = frozen_copy(checkpoint, owned)
        except Exception as error:
            self._is_broken = True
            say(
                self._trainer,
                f"No more snapshots are written: something in the checkpoint cannot be copied ({type(error).__name__}: "
                f"{error}). Look at what on_save_checkpoint and state_dict of the module and of callbacks put into it.",
            )
            return
        if self._segment and self._service is not None:
            self._service.expect_snapshot(self._segment)
            self._untold = self._segment
        self._writer.write(frozen, self._segment)

    @property
    def written(self) -> int:
        """How many were written."""
        return self._writer.written

    def finish(self, timeout_s: float) -> None:
        """The fit is over: waits for what is being written; the newest snapshot stays.

        Args:
            timeout_s: it is given up after so many seconds.
        """
        self._writer.finish(timeout_s)
        self._say_lines()

    def _tell_holder(self) -> None:
        if self._untold and self._service is not None and self._writer.segment == self._untold:
            self._service.note_saved(self._untold)
            self._untold = ""

    def _say_lines(self) -> None:
        for line in self._writer.take_lines():
            say(self._trainer, line)


@dataclass(frozen=True, slots=True)
class SnapshotPlace:
    """What a user says of snapshots.

    Args:
        every_s: seconds from one to the next; None writes none.
        path: where they are; None is ``lightning_async/snapshot.ckpt`` in the Trainer's ``default_root_dir``.

    Raises:
        ValueError: if it has no meaning.
    """

    every_s: float | None = None
    path: str | Path | None = None

    def __post_init__(self) -> None:
        if self.every_s is None:
            if self.path is not None:
                raise ValueError(
                    f"snapshot_path={str(self.path)!r} says where snapshots go, and snapshot_every_s=None that none "
                    "is written. Pass snapshot_every_s=60, for instance"
                )
        elif isinstance(self.every_s, bool) or not 0 < self.every_s < math.inf:
            raise ValueError(f"snapshot_every_s={self.every_s!r} must be a number of seconds above 0, or None")

    def count_fit(self, trainer: Trainer) -> int | None:
        """Counts a fit whose ranks are about to be started from here, where they cannot count; returns its number."""
        return None if self.every_s is None else _count_fit(Path(self._place_for(trainer)).absolute())

    def open(
        self, trainer: Trainer, collectives: Collectives, joins: Callable[[], bool], fit: int | None = None
    ) -> Snapshots | None:
        """A fit's snapshots; None if there are none.

        Args:
            trainer: the trainer.
            collectives: the strategy's own.
            joins: whether this rank joins a run that is under way.
            fit: what `count_fit` has returned; None where this process makes all fits of the script.

        Raises:
            MisconfigurationException: if they would not be in a folder of this host.
        """
        if self.every_s is None:
            return None
        place = self._place_for(trainer)
        if "://" in place:
            raise MisconfigurationException(
                f"snapshots are replaced by a rename, which {place} has none of. Pass a snapshot_path in a folder."
            )
        return Snapshots(trainer, Path(place), self.every_s, collectives, joins, fit=fit)

    def _place_for(self, trainer: Trainer) -> str:
        return f"{trainer.default_root_dir}/lightning_async/snapshot.ckpt" if self.path is None else str(self.path)


def _count_fit(path: Path) -> int:
    _fits[path] += 1
    return _fits[path]
