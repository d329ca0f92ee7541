"""Where a fit begins: from what it was given, or where the job stood that was started again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_async.exchange.last_state import LastStateFile
from lightning_async.loops import restarts
from lightning_async.loops.protocols import Collectives
from lightning_async.runtime.job import Job
from lightning_async.runtime.whole_file import WholeFile
from lightning_async.strategies.checkpointing import CHECKPOINT_KEY
from lightning_async.strategies.just_in_time import bring_up_to_date
from lightning_async.strategies.snapshot_file import SnapshotFile

__all__ = ["SNAPSHOT_KEY", "StartChoice"]

SNAPSHOT_KEY = "snapshot"
# Until the holder's process of the start before has written what it had; of another run, which may live long.
_LAST_STATE_S, _ANOTHERS_S = 60.0, 5.0


class StartChoice(restarts.Snapshots):
    """Knows the snapshot that a run has left, and whether a fit goes on from it.

    Args:
        trainer: the trainer.
        file: where snapshots are.
        collectives: the strategy's own.
        joins: whether this rank joins a run that is under way.
        job: of this process.

    Attributes:
        job: the same, with what each rank knows of it, once the fit has begun.
        given: name of the checkpoint that the fit was given; empty without one.
    """

    def __init__(
        self,
        trainer: Trainer,
        file: SnapshotFile,
        collectives: Collectives,
        joins: Callable[[], bool],
        job: Job,
    ) -> None:
        self._trainer = trainer
        self._file = file
        self._collectives = collectives
        self._joins = joins
        # What the holder's own process leaves beside them.
        self._last = LastStateFile(file.path)
        self.job = job
        self.given = ""

    @override
    def choose(self, path: Path | None, is_requeued: bool) -> Path | None:
        """What a fit begins from: what it was given, or the snapshot that its job has left; a collective call.

        Raises:
            MisconfigurationException: if a rank does not see the snapshot.
        """
        if self._joins():
            return path
        self.job = self.job.among(self._collectives.gather_objects(self.job))
        self.given = _name(path)
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

    def note(self) -> dict[str, Any]:
        """What a snapshot keeps, to be known again."""
        module = _fingerprint(self._trainer.lightning_module)
        return {"job": self.job.state(), "module": module, "given": self.given}

    def _decide(self, given: Path | None, is_requeued: bool) -> tuple[Path | None, str]:
        path, own = self._file.path, given is not None and not is_requeued
        if not self._last.wait(_LAST_STATE_S if self.job.restarted_by else _ANOTHERS_S):
            rank_zero_info(
                f"Another run has its snapshots in {path.parent}, too, or an earlier start still writes there."
            )
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
        if not self.job.restarted_by and (isinstance(note, str) or self._mismatch(note) is not None):
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
        restarted_by = " and ".join(self.job.restarted_by or ["torchrun"])
        return path, (
            f"This job was restarted by {restarted_by} and goes on from the snapshot {path}: "
            f"epoch {note['epoch']}, step {note['step']}, {_age(note['written'])} old."
        )

    def _began_from(self, given: Path | None, note: Mapping[str, Any]) -> bool:
        """Whether a snapshot is of a start of this job that was given the same checkpoint, and is further than that."""
        return bool(self.job.restarted_by) and note.get("given", "") == _name(given) and self._mismatch(note) is None

    def _bring_up_to_date(self) -> str | None:
        """Puts what the holder's process has left into the snapshot; returns what the user should know of it."""
        path, left = self._file.path, self._last.path
        if not (path.exists() and left.exists()):
            return None
        try:
            snapshot = _load(path)
            noted = snapshot[CHECKPOINT_KEY]
            note = noted[SNAPSHOT_KEY]
            segment: str = note.get("segment", "")
            last = self._last.read(segment)
            behind = -1 if last is None else last.version - noted["version"]
            if last is None or not segment or behind < 0:
                self._last.remove()
                return None
            bring_up_to_date(snapshot, noted, last, note["places"], note["counts_steps"])
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
        if not self.job.continues(Job.load(note["job"])):
            return "it is from another job"
        if note["module"] != _fingerprint(self._trainer.lightning_module):
            return "its module has parameters of other names or shapes"
        return None


def _load(path: Path) -> dict[str, Any]:
    """A snapshot, whose tensors are in memory once they are looked at."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return checkpoint


def _note_in(path: Path) -> dict[str, Any] | str:
    """What a snapshot notes of its run, or why it cannot be read."""
    try:
        note: dict[str, Any] = _load(path)[CHECKPOINT_KEY][SNAPSHOT_KEY]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return note


def _name(given: Path | None) -> str:
    return "" if given is None else str(given.absolute())


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
