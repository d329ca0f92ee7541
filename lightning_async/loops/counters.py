"""Lightning's counters of batches and steps, as DDP would show them.

Between stops each rank counts its own batches. What a checkpoint records must mean the same to any other strategy, and
to this one with another number of ranks.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

__all__ = ["count_as_ddp", "rewrite_as_ddp"]


def count_as_ddp(loop: _TrainingEpochLoop, batches: int, batches_before: int, clock: int, is_last: bool) -> None:
    """Sets an epoch loop's counters to what DDP would show where the ranks have met; a checkpoint records them.

    Args:
        loop: the loop.
        batches: batches per rank of this epoch.
        batches_before: batches per rank of all earlier epochs.
        clock: optimizer steps per rank.
        is_last: whether the epoch is over.
    """
    progress = loop.batch_progress
    for tracker, value in ((progress.current, batches), (progress.total, batches_before + batches)):
        tracker.ready = tracker.started = tracker.processed = tracker.completed = value  # type: ignore[attr-defined]
    progress.is_last_batch = is_last
    automatic = loop.automatic_optimization.optim_progress.optimizer.step
    for step in (automatic, loop.manual_optimization.optim_step_progress):
        behind = step.total.completed - step.current.completed
        step.total.ready = step.total.completed = clock
        step.current.ready = step.current.completed = max(0, clock - behind)


def rewrite_as_ddp(state: dict[str, Any], prefix: str, batches: int, batches_before: int, clock: int) -> None:
    """Rewrites the counters in an epoch loop's ``state_dict`` to those after a batch in mid-epoch, in place.

    Args:
        state: what the loop's ``state_dict`` has filled.
        prefix: the loop's prefix in it.
        batches: batches per rank of this epoch.
        batches_before: batches per rank of all earlier epochs.
        clock: optimizer steps per rank.
    """
    progress = state[f"{prefix}batch_progress"]
    for name, count in (("current", batches), ("total", batches_before + batches)):
        # Saved while a batch ends, as Lightning's callbacks do: a resumed run counts that batch as completed.
        progress[name] |= {"ready": count, "started": count, "processed": count, "completed": count - (batches > 0)}
    progress["is_last_batch"] = False
    automatic = state[f"{prefix}automatic_optimization.optim_progress"]["optimizer"]["step"]
    for steps in (automatic, state[f"{prefix}manual_optimization.optim_step_progress"]):
        before = steps["total"]["completed"] - steps["current"]["completed"]
        steps["total"] |= {"ready": clock, "completed": clock}
        steps["current"] |= {"ready": max(0, clock - before), "completed": max(0, clock - before)}
