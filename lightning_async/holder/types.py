"""What goes into the holder and what comes out of it: a push, what became of it, and a snapshot."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_async.holder.gradient_mean import Gathered

__all__ = ["HalfUpdatedError", "Push", "Snapshot", "Update", "WaitingPush"]


class HalfUpdatedError(RuntimeError):
    """The holder was to be read, or updated further, in the middle of an update, or after one that was broken off."""


class Push(NamedTuple):
    """A gradient and what is needed to apply it.

    Args:
        worker: the worker that computed it.
        optimizer: index of the optimizer that owns the parameters.
        version_read: version of the parameters that it was computed at.
        gradients: one tensor per parameter of the optimizer, None where the parameter took no part.
        groups: the worker's current hyperparameters, of all param groups, in the order of `HyperparamLayout`.
        tickets: the batches that the gradient covers.
        samples: number of samples in them.
        waited_s: seconds that the worker's previous push and pull took.
        slot: which of the worker's slots it came by; each holds parameters of its own version (see `slot.py`).
        counts: what the worker has counted since its last report, this step included (see `tally.py`); empty where
            nothing but updates is counted.
        flat: what the gradients are parts of, in the holder's layout; None if they are not.
        finite: False if there is NaN or infinity in the gradients, which are then rejected.
        wire_bytes: bytes of payloads that went over a network with this worker since its last push, this one included.
    """

    worker: int
    optimizer: int
    version_read: int
    gradients: Sequence[Tensor | None]
    groups: Sequence[float]
    tickets: tuple[range, ...] = ()
    samples: int = 0
    waited_s: float = 0.0
    slot: int = 0
    counts: Sequence[int] = ()
    flat: Tensor | None = None
    finite: bool = True
    wire_bytes: int = 0

    @property
    def batches(self) -> int:
        """Number of batches that the gradient covers."""
        return len(self.tickets[0]) if len(self.tickets) == 1 else sum(map(len, self.tickets))


class WaitingPush(NamedTuple):
    """A push that waits for the holder, and where its answer goes.

    Attributes:
        push: the push.
        out: what the parameters are copied to.
        reads_next: tells whether the worker pulls next; see `Holder.try_push`.
    """

    push: Push
    out: Tensor
    reads_next: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Update:
    """What became of a push.

    Args:
        push: the push.
        version: the holder's version after it.
        staleness: updates applied between the read and this push, k - r.
        applied: False if it was dropped as too stale, or rejected.
        parked_s: seconds that the barrier held it back.
        at_ns: when, by the monotonic clock; now by default.
        took_ns: how long the update itself took; with a holder on a GPU, to queue it.
        rejected: True if it was not applied because the gradient is not finite.
    """

    push: Push
    version: int
    staleness: int
    applied: bool
    parked_s: float
    at_ns: int = field(default_factory=time.monotonic_ns)
    took_ns: int = 0
    rejected: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Parameters and optimizer states of one version, and the tickets that it was made of; owns its memory.

    Args:
        version: the version.
        parameters: the flat buffer.
        optimizer_states: each optimizer's state dict.
        adapted: for each optimizer and param group the values that its own steps have changed.
        applied: the tickets of this epoch that are applied, as ranges ``(start, stop)``.
        counts: what all workers have counted.
        gathered: gradients that wait for more to make an update with; None if there are none.
        policy: what the staleness policy has learned, and its class; empty where nobody asks.
    """

    version: int
    parameters: Tensor
    optimizer_states: list[dict[str, Any]]
    adapted: list[list[dict[str, Any]]]
    applied: tuple[tuple[int, int], ...] = ()
    counts: tuple[int, ...] = ()
    gathered: Gathered | None = None
    policy: dict[str, Any] = field(default_factory=dict)
