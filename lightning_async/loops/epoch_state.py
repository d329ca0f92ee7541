"""Where a rank stands in an epoch."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from lightning_async.data.epoch_plan import EpochPlan

__all__ = ["EpochState", "EpochStop", "Stage"]


class Stage(enum.Enum):
    """Where a rank stands between two batches."""

    # All ranks have met, and whether to stop is to be agreed on.
    MET = enum.auto()
    # It is agreed on.
    AGREED = enum.auto()
    # The ranks train in a segment.
    APART = enum.auto()


@dataclass
class EpochState:
    """Where this rank stands in the epoch; steps and batches are counted per rank, as DDP would.

    Attributes:
        plan: the epoch's size and stops; None before its first segment.
        stage: where this rank stands between two batches.
        tickets_done: batches of all ranks that were applied when they last met.
        batches_before: batches of all earlier epochs.
        clock: steps of the shared clock that this rank has seen.
        log_clock: what the loggers' x-axis was then.
        ticks: the steps that the clock took since the batch before.
        learning: whether the segment is to show how many batches make a step.
        first_step: the step that the epoch began with.
        first_batch: the batch that it began with.
        batches_started: this rank's own batches before the segment.
        scheduled: steps of the clock that the learning-rate schedulers have made.
        scheduled_batch: the batch that a scheduler is stepped for; None while none is.
        validation_requested: whether this rank wants to validate at the next stop.
        validated_at: the ticket at which the ranks validated last.
        draws_further: whether the epoch's order is drawn further while the ranks train.
    """

    plan: EpochPlan | None = None
    stage: Stage = Stage.MET
    tickets_done: int = 0
    batches_before: int = 0
    clock: int = 0
    log_clock: int = 0
    ticks: range = range(0)
    learning: bool = False
    first_step: int = 0
    first_batch: int = 0
    batches_started: int = 0
    scheduled: int = 0
    scheduled_batch: int | None = None
    validation_requested: bool = False
    validated_at: int = -1
    draws_further: bool = False


@dataclass(frozen=True, slots=True)
class EpochStop:
    """Where in the epoch all ranks have met.

    Args:
        position: tickets before it.
        batches: batches per rank before it, as DDP would count them.
        batches_since: batches that each rank would have computed under DDP since the last stop.
        is_complete: whether nothing more of the epoch is to come.
        validation_requested: whether a rank has asked for a validation here.
    """

    position: int
    batches: int
    batches_since: int
    is_complete: bool
    validation_requested: bool
