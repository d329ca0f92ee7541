"""What a follower is told to do, in the order in which the sequencing holder has decided it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from lightning_async.holder.barrier_policies import OnStale
from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.momentum import MomentumCorrection

__all__ = [
    "NUMBERS",
    "Adjust",
    "ApplyPush",
    "Attach",
    "Complete",
    "CopyOut",
    "Depart",
    "Forget",
    "LoadParameters",
    "LoadStates",
    "Operation",
    "ReadState",
    "Restore",
    "Serve",
    "ShardSpec",
    "TakeAdapted",
    "TakeSnapshot",
    "is_reported",
]


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What a follower is to hold, and how.

    Args:
        shard: its number.
        kind: the optimizer's class.
        attributes: what the optimizer is made of, over the shard's pieces; see `assemble`.
        parameters: its part of the flat vector.
        elements: where in the flat vector that is.
        numel: size of the flat vector.
        places: for each piece the place of its parameter.
        state: what the optimizer keeps for each piece to begin with; None for what it has.
        max_staleness: the bound.
        on_stale: what keeps it.
        version: the version to start from.
        gradients_per_update: gradients that make a version.
        policy: what is done with a gradient because of its age, bound to the run.
        momentum_correction: the strategy's argument.
        workers: number of ranks.
        default_dtype: torch's in rank 0's process.
    """

    shard: int
    kind: type[torch.optim.Optimizer]
    attributes: dict[str, Any]
    parameters: torch.Tensor
    elements: slice
    numel: int
    places: Sequence[int]
    state: dict[int, Any] | None
    max_staleness: int | None
    on_stale: OnStale
    version: int
    gradients_per_update: int
    policy: StalenessPolicy
    momentum_correction: MomentumCorrection
    workers: int
    default_dtype: torch.dtype


# What rank 0 alone knows of a spec, in plain values: the rest is the same on every rank.
NUMBERS = (
    "parameters",
    "state",
    "max_staleness",
    "on_stale",
    "version",
    "gradients_per_update",
    "momentum_correction",
    "workers",
)


class Serve(NamedTuple):
    """Holds what a shared payload's `ShardSpec` says."""

    payload: str


class Attach(NamedTuple):
    """Maps the memory of a worker's slot: its gradient, and the parameters that it is answered with."""

    worker: int
    slot: int
    memory: str


class ApplyPush(NamedTuple):
    """Takes the gradient that lies in a slot's memory.

    Attributes:
        worker: whose it is.
        slot: which of the worker's slots.
        version_read: version that it was computed at.
        groups: the worker's hyperparameters.
        samples: number of samples in it.
        present: for each parameter whether it has a gradient; None if all have.
        finite: whether all of the gradient is finite, the other shards' parts included.
        version: the sequencing holder's version after it.
        applied: whether it was applied there.
    """

    worker: int
    slot: int
    version_read: int
    groups: Sequence[float]
    samples: int
    present: tuple[bool, ...] | None
    finite: bool
    version: int
    applied: bool


class CopyOut(NamedTuple):
    """Copies the parameters into a slot's memory.

    Attributes:
        worker: whose it is.
        slot: which of the worker's slots.
        version: the sequencing holder's version.
        reads: whether the worker computes at them, and so is outstanding; else it has read past the barrier.
    """

    worker: int
    slot: int
    version: int
    reads: bool


class Depart(NamedTuple):
    """Takes a worker's slot out of the barrier."""

    worker: int
    slot: int


class Complete(NamedTuple):
    """Makes an update of the gradients that wait for more."""


class Adjust(NamedTuple):
    """Goes on by other rules; see `Holder.adjust`."""

    max_staleness: int | None
    on_stale: OnStale
    gradients_per_update: int
    policy: StalenessPolicy


class LoadParameters(NamedTuple):
    """Takes over the pieces in a shared payload where they differ."""

    payload: str


class LoadStates(NamedTuple):
    """Takes over the optimizer's state in a shared payload if it differs."""

    payload: str


class ReadState(NamedTuple):
    """Answers with a shared payload of what the optimizer keeps, by pieces."""


class TakeAdapted(NamedTuple):
    """Counts what steps have changed in the param groups as known; see `HeldOptimizer.take_adapted`."""


class TakeSnapshot(NamedTuple):
    """Answers with a shared payload of a `Snapshot`."""


class Restore(NamedTuple):
    """Loads a version and what a shared payload has: a state dict, gathered gradients, the policy's state."""

    version: int
    payload: str


class Forget(NamedTuple):
    """Lets go of the shared payload that the operation at ``place`` was answered with."""

    place: int


Operation: TypeAlias = (
    Serve
    | Attach
    | ApplyPush
    | CopyOut
    | Depart
    | Complete
    | Adjust
    | LoadParameters
    | LoadStates
    | ReadState
    | TakeAdapted
    | TakeSnapshot
    | Restore
    | Forget
)


def is_reported(operation: Operation) -> bool:
    """Whether a follower says that it is done; what comes before it is then done too."""
    return not isinstance(operation, (ApplyPush, Depart, Complete, Adjust, Forget, TakeAdapted))
