"""What the holder's own process leaves when rank 0 is lost, and what the job's next start finds.

A just-in-time snapshot: of what was applied nothing is lost, however long ago rank 0 has written a snapshot of the run.
The two belong together: Lightning's loops, callbacks and loggers are rank 0's, and only its snapshot has them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder.types import Snapshot
from lightning_async.runtime.whole_file import WholeFile

__all__ = ["LastState", "LastStateFile"]

log = logging.getLogger(__name__)

_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class LastState:
    """What a holder had when rank 0 was lost.

    Args:
        segment: rank 0's name of the segment of training that it is of; see `Service.save_on_loss`.
        version: the version.
        parameters: for each optimizer its parameters, in the order of its groups.
        optimizer_states: each optimizer's state dict, by the places of those parameters.
        adapted: for each optimizer and param group the values that its own steps have changed.
        applied: the tickets of the epoch that are applied, as ranges ``(start, stop)``.
        counts: what all workers have counted.
        gathered: gradients that wait for more to make an update with, as a checkpoint has them; None if there are none.
        policy: what the staleness policy has learned, and its class.
    """

    segment: str
    version: int
    parameters: list[list[Tensor]]
    optimizer_states: list[dict[str, Any]]
    adapted: list[list[dict[str, Any]]]
    applied: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    gathered: dict[str, Any] | None
    policy: dict[str, Any]

    @classmethod
    def of(cls, segment: str, snapshot: Snapshot, parameters: list[list[Tensor]]) -> LastState:
        """The state in a snapshot of the holder.

        Args:
            segment: the segment's name.
            snapshot: the snapshot.
            parameters: views of its flat buffer.
        """
        gathered = None if snapshot.gathered is None else asdict(snapshot.gathered)
        return cls(
            segment,
            snapshot.version,
            parameters,
            snapshot.optimizer_states,
            snapshot.adapted,
            snapshot.applied,
            snapshot.counts,
            gathered,
            snapshot.policy,
        )


class LastStateFile:
    """Where a last state is left: beside the snapshots of the run that it belongs to.

    Args:
        snapshot: the snapshots' file.

    Examples:
        >>> LastStateFile(Path("logs/snapshot.ckpt")).path.name
        'snapshot.last.pt'
    """

    def __init__(self, snapshot: Path) -> None:
        self.path = snapshot.with_name(f"{snapshot.stem}.last.pt")
        self._lock = snapshot.with_name(f".{snapshot.stem}.last.lock")
        self._held: int | None = None

    # --- by the holder's process -------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Has the next start of the job wait as long as this process lives; idempotent."""
        if self._held is not None:
            return
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        self._held = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Another run writes here, of which the snapshots' writer tells, or the file system has no locks.
            log.debug("%s is not locked: %s", self._lock, error)

    def write(self, states: Iterable[LastState]) -> None:
        """Leaves states of several segments, of one of which the snapshot is.

        Raises:
            OSError: if they cannot be written.
        """
        WholeFile(self.path).write({"states": [_as_dict(state) for state in states]})

    def release(self) -> None:
        """There is nothing to wait for: the fit has ended with rank 0 in it; idempotent."""
        if self._held is not None:
            with suppress(OSError):
                self._lock.unlink()
            os.close(self._held)
            self._held = None

    # --- by the job's next start -------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> bool:
        """Waits until no process may still write here; tells whether there is none.

        Args:
            timeout_s: for how long.
        """
        try:
            lock = os.open(self._lock, os.O_RDWR)
        except OSError:
            return True
        deadline = time.monotonic() + timeout_s
        try:
            while not _is_free(lock):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOOK_S)
            with suppress(OSError):
                self._lock.unlink()
            return True
        finally:
            os.close(lock)

    def read(self, segment: str) -> LastState | None:
        """What was left of a segment; None if nothing was.

        Raises:
            Exception: whatever torch, or pickle, finds wrong with the file.
        """
        if not self.path.exists():
            return None
        # Written by this run's own process, beside a snapshot that is read in the same way.
        left = torch.load(self.path, map_location="cpu", mmap=True, weights_only=False)["states"]
        return next((LastState(**state) for state in left if state["segment"] == segment), None)

    def remove(self) -> None:
        """Removes what was left."""
        self.path.unlink(missing_ok=True)


def _as_dict(state: LastState) -> dict[str, Any]:
    found = {name: getattr(state, name) for name in LastState.__slots__}
    # A view would take the whole flat buffer into the file with it.
    return found | {"parameters": [[view.clone() for view in of_one] for of_one in state.parameters]}


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no locks here: %s", error)
    return True
