"""Snapshots of a run, written while it trains, and found by the job that is started again."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_async.exchange.last_state import LastState, LastStateFile
from lightning_async.exchange.service import Service
from lightning_async.loops import restarts
from lightning_async.loops.progress_bar import say
from lightning_async.loops.protocols import Collectives
from lightning_async.runtime.job import Job
from lightning_async.runtime.whole_file import WholeFile
from lightning_async.strategies.checkpointing import CHECKPOINT_KEY
from lightning_async.strategies.frozen import frozen_copy
from lightning_async.strategies.just_in_time import bring_up_to_date
from lightning_async.strategies.snapshot_file import SnapshotFile
from lightning_async.strategies.snapshot_writer import SnapshotWriter

__all__ = ["SnapshotPlace", "Snapshots"]

_KEY = "snapshot"
# Until the holder's process of the start before has written what it had.
_LAST_STATE_S = 60.0
# How many fits of this process have had their snapshots at a place: a script may fit twice.
_fits: Counter[Path] = Counter()


class Snapshots(restarts.Snapshots):
    """One fit's snapshots: ordinary checkpoints, taken on rank 0 between two of its batches.

    Args:
        trainer: the trainer.
        path: where they are, one in the place of the other.
        every_s: seconds from one to the next.
        collectives: the strategy's own.
        joins: whether this rank joins a run that is under way.
        job: of this process.
    """

    def __init__(
        self,
        trainer: Trainer,
        path: Path,
        every_s: float,
        collectives: Collectives,
        joins: Callable[[], bool],
        job: Job | None = None,
    ) -> None:
        self._trainer = trainer
        self._every_s = every_s
        self._collectives = collectives
        self._joins = joins
        self._job = Job.of_environment() if job is None else job
        self._file = SnapshotFile(path.absolute())
        self._writer = SnapshotWriter(self._file)
        # What the holder's own process leaves beside it, and what this segment is called there; empty without such a
        # process.
        self._last = LastStateFile(self._file.path)
        self._segment = ""
        # The checkpoint that the fit was given.
        self._given = ""
        _fits[self._file.path] += 1
        self._fit = _fits[self._file.path]
        self._next = time.monotonic() + every_s
        self._is_broken = False
        self.is_taking = False

    # --- where a fit begins ------------------------------------------------------------------------------------------

    @override
    def choose(self, path: Path | None, is_requeued: bool) -> Path | None:
        """What a fit begins from: what it was given, or the snapshot that its job has left; a collective call.

        Raises:
            MisconfigurationException: if a rank does not see the snapshot.
        """
        if self._joins():
            return path
        self._job = self._job.among(self._collectives.gather_objects(self._job))
        self._given = _name(path)
        mine = self._decide(path, is_requeued) if self._trainer.is_global_zero else (path, "")
        chosen, line = self._collectives.broadcast(mine)
        if line:
            rank_zero_info(line)
        if chosen is None or chosen == path:
            return path
        seen = self._collectives.gather_objects(chosen.exists())
        if not all(seen):
            raise MisconfigurationException(
                f"rank {seen.index(False)} does not see {chosen}, the snapshot that the restarted job goes on from. "
                "Pass a snapshot_path in a folder that all hosts share."
            )
        return Path(chosen)

    def _decide(self, given: Path | None, is_requeued: bool) -> tuple[Path | None, str]:
        path, own = self._file.path, given is not None and not is_requeued
        if not self._last.wait(_LAST_STATE_S):
            rank_zero_info(f"A process of another start of this run still writes to {self._last.path}; it is let be.")
        self._file.remove_leftovers()
        if (line := self._bring_up_to_date()) is not None:
            rank_zero_info(line)
        if not path.exists():
            return given, ""
        if own and given is not None and given.exists() and given.samefile(path):
            self._file.take_over()
            return given, ""
        note = _note_in(path)
        if own and (isinstance(note, str) or not self._began_from(given, note)):
            return given, ""
        if not self._job.restarted_by and (isinstance(note, str) or self._mismatch(note) is not None):
            return given, (
                f"{path} is the snapshot of an earlier run, {_age(path.stat().st_mtime)} old; "
                f"trainer.fit(ckpt_path=...) goes on from it. This run begins anew, and keeps it as "
                f"{self._file.previous.name} when it writes its own."
            )
        if isinstance(note, str):
            return given, f"The snapshot {path} cannot be read and is left alone: {note}"
        if (reason := self._mismatch(note)) is not None:
            return given, f"The snapshot {path} is left alone: {reason}."
        self._file.take_over()
        if is_requeued and given is not None and given.stat().st_mtime > note["written"]:
            return given, ""
        restarted_by = " and ".join(self._job.restarted_by or ["torchrun"])
        return path, (
            f"This job was restarted by {restarted_by} and goes on from the snapshot {path}: "
            f"epoch {note['epoch']}, step {note['step']}, {_age(note['written'])} old."
        )

    def _began_from(self, given: Path | None, note: Mapping[str, Any]) -> bool:
        """Whether a snapshot is of a start of this job that was given the same checkpoint, and is further than that."""
        return bool(self._job.restarted_by) and note.get("given", "") == _name(given) and self._mismatch(note) is None

    def _bring_up_to_date(self) -> str | None:
        """Puts what the holder's process has left into the snapshot; returns what the user should know of it."""
        path, left = self._file.path, self._last.path
        if not (path.exists() and left.exists()):
            return None
        try:
            snapshot = torch.load(path, map_location="cpu", weights_only=False)
            last, note = self._last.read(), snapshot[CHECKPOINT_KEY][_KEY]
            if last is None or not (_is_of_segment(note, last) and last.version >= snapshot[CHECKPOINT_KEY]["version"]):
                self._last.remove()
                return None
            behind = last.version - snapshot[CHECKPOINT_KEY]["version"]
            bring_up_to_date(snapshot, last, note["places"], note["counts_steps"])
            note |= {"step": snapshot["global_step"], "written": left.stat().st_mtime, "segment": ""}
            WholeFile(path).write(snapshot)
        except Exception as error:
            return (
                f"What the holder's process had when rank 0 was lost cannot be used ({type(error).__name__}: {error}): "
                f"{left} stays, and the snapshot {path} is as it was."
            )
        self._last.remove()
        return (
            f"When rank 0 was lost, the holder's process was {behind} updates further than the snapshot {path}, which "
            "has them now."
        )

    def _mismatch(self, note: Mapping[str, Any]) -> str | None:
        """Why a snapshot is not this fit's, if it is not."""
        if not self._job.continues(Job.load(note["job"])):
            return "it is from another job"
        if note["fit"] != self._fit:
            return f"it is from fit number {note['fit']} of the script, and this is number {self._fit}"
        if note["module"] != _fingerprint(self._trainer.lightning_module):
            return "its module has parameters of other names or shapes"
        return None

    # --- while it trains ---------------------------------------------------------------------------------------------

    def begin_segment(self, service: Service) -> None:
        """The ranks are about to part; a process of the holder's own leaves its state if rank 0 is lost meanwhile.

        Args:
            service: the holder's side.
        """
        name = uuid.uuid4().hex
        self._segment = name if service.save_on_loss(str(self._file.path), name) else ""
        if self._segment:
            # What it leaves belongs to a snapshot of the same segment. Short ones of a large model go without.
            self._next = min(self._next, max(time.monotonic(), self._writer.rests_until_s))

    def take_if_due(self) -> None:
        """Takes a snapshot, on rank 0 between two batches, if one is due and none is being written; no collective."""
        if time.monotonic() < self._next or self._writer.is_busy or self._is_broken:
            return
        self._next = time.monotonic() + self._every_s
        self._say_lines()
        self.is_taking = True
        try:
            # As any other: with all that user code adds. `write` is called with what it has come to.
            self._trainer.save_checkpoint(self._file.path, weights_only=False)
        finally:
            self.is_taking = False

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
        checkpoint[CHECKPOINT_KEY][_KEY] = {
            "job": self._job.state(),
            "fit": self._fit,
            "module": _fingerprint(self._trainer.lightning_module),
            "epoch": checkpoint["epoch"],
            "step": step,
            "written": time.time(),
            "given": self._given,
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
        self._writer.write(frozen)

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

    def open(self, trainer: Trainer, collectives: Collectives, joins: Callable[[], bool]) -> Snapshots | None:
        """A fit's snapshots; None if there are none.

        Args:
            trainer: the trainer.
            collectives: the strategy's own.
            joins: whether this rank joins a run that is under way.

        Raises:
            MisconfigurationException: if they would not be in a folder of this host.
        """
        if self.every_s is None:
            return None
        path = self.path if self.path is not None else f"{trainer.default_root_dir}/lightning_async/snapshot.ckpt"
        if "://" in str(path):
            raise MisconfigurationException(
                f"snapshots are replaced by a rename, which {path} has none of. Pass a snapshot_path in a folder."
            )
        return Snapshots(trainer, Path(path), self.every_s, collectives, joins)


def _note_in(path: Path) -> dict[str, Any] | str:
    """What a snapshot notes of its run, or why it cannot be read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        note: dict[str, Any] = checkpoint[CHECKPOINT_KEY][_KEY]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return note


def _name(given: Path | None) -> str:
    return "" if given is None else str(given.absolute())


def _is_of_segment(note: Mapping[str, Any], last: LastState) -> bool:
    """Whether a snapshot, with this note, and what a holder's process has left are of one segment."""
    return bool(note.get("segment")) and note["segment"] == last.segment


def _fingerprint(module: LightningModule) -> str:
    """A digest of the names and shapes of a module's parameters."""
    described = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _age(since: float) -> str:
    """How long ago a time is, in words.

    Examples:
        >>> _age(time.time() - 90), _age(time.time() - 7_300)
        ('90 s', '2 h')
    """
    seconds = max(0.0, time.time() - since)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
