"""Lightning's counters of batches and steps, as DDP would show them.

Between stops each rank counts its own batches. What a checkpoint records must mean the same to any other strategy, and
to this one with another number of ranks.
"""

from __future__ import annotations

from typing import Any

__all__ = ["rewrite_as_ddp"]


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
