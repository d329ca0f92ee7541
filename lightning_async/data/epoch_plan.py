"""Where an epoch stops for validation, counted in tickets over all ranks.

Lightning counts batches per rank. Under this strategy ranks take different numbers of batches, so every count is
translated: b batches per rank under DDP are b * N tickets here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_async.data.ranges import UNBOUNDED

__all__ = ["EpochPlan", "log_position", "tickets_until"]


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """One epoch's size and the places in it where Lightning would validate.

    Args:
        tickets: batches of the epoch over all ranks.
        batches: what DDP would count per rank: ``trainer.num_training_batches``.
        world_size: number of ranks N.
        validate_every: ``trainer.val_check_batch``: batches per rank between validations; None for no validation
            that is scheduled by batches.
        batches_before: batches per rank of all earlier epochs, if the interval runs across epochs
            (``check_val_every_n_epoch=None``), else 0.
        block: batches that make one update (``accumulate_grad_batches``). A stop within an update comes before it: the
            parameters are those that DDP would validate, whose gradient is incomplete there too.

    Examples:
        >>> plan = EpochPlan(tickets=10, batches=3, world_size=4, validate_every=2)
        >>> plan.until_stop(0), plan.until_stop(8)
        (8, 2)
        >>> plan.validation_due(8), plan.validation_due(10)
        (True, False)
        >>> plan = EpochPlan(tickets=20, batches=10, world_size=2, validate_every=3, block=4)
        >>> plan.until_stop(0), plan.until_stop(4), plan.until_stop(12)
        (4, 8, 4)
        >>> plan.validation_due(4), plan.validation_due(6)
        (True, False)
    """

    tickets: int
    batches: int
    world_size: int
    validate_every: int | None = None
    batches_before: int = 0
    block: int = 1

    def batches_done(self, tickets_done: int) -> int:
        """Batches per rank that DDP would have counted."""
        if tickets_done >= self.tickets:
            return self.batches
        if self.tickets == UNBOUNDED:
            return -(-tickets_done // self.world_size)
        return min(tickets_done // self.world_size, self.batches - 1)

    def batches_computed(self, tickets_done: int) -> int:
        """Those of them that are computed: `StochasticWeightAveraging` has one counted that does not exist."""
        return min(self.batches_done(tickets_done), -(-self.tickets // self.world_size))

    def end(self, tickets_done: int) -> int:
        """The ticket that counts as the epoch's end when nothing is left of it after ``tickets_done``."""
        return self.tickets if self.tickets < UNBOUNDED else tickets_done

    def until_stop(self, tickets_done: int) -> int:
        """Tickets to hand out before the next validation or the end of the epoch."""
        remaining = self.tickets - tickets_done
        if self.validate_every is None:
            return remaining
        position = (self.batches_before + tickets_done // self.world_size) // self.validate_every * self.validate_every
        while self._ticket_at(position) <= tickets_done:
            position += self.validate_every
        if position - self.batches_before >= self.batches:
            return remaining
        return min(self._ticket_at(position) - tickets_done, remaining)

    def validation_due(self, tickets_done: int) -> bool:
        """Whether the interval ends here; an epoch that was left early in mid-batch is at no interval's end."""
        if self.validate_every is None:
            return False
        if tickets_done >= self.tickets:
            position = self.batches_before + self.batches
            return position % self.validate_every == 0
        position = self.batches_before - -tickets_done // self.world_size
        position += -position % self.validate_every
        end = self.batches_before + self.batches
        return 0 < position < end and self._ticket_at(position) == tickets_done

    def _ticket_at(self, position: int) -> int:
        """The first ticket behind the last whole update before ``position``, counted in batches per rank."""
        return (position - self.batches_before) * self.world_size // self.block * self.block


def tickets_until(max_steps: int, counted: int, world_size: int, steps: int, block: int) -> int:
    """Tickets to hand out until every rank would have made ``max_steps`` steps under DDP.

    A rank under DDP ends with the batch in which it reaches them, so with several steps in a batch it may make a few
    more.

    Args:
        max_steps: ``trainer.max_steps``.
        counted: steps of all ranks so far.
        world_size: number of ranks N.
        steps: the most steps that one block of batches makes.
        block: batches that make these steps.

    Examples:
        >>> tickets_until(5, counted=0, world_size=3, steps=1, block=1)
        15
        >>> tickets_until(5, counted=6, world_size=3, steps=2, block=4)  # each rank makes 6 steps
        24
        >>> tickets_until(5, counted=14, world_size=3, steps=1, block=1)
        1
    """
    groups = world_size * -(-max_steps // steps) - counted // steps
    return max(groups, 1) * block


def log_position(previous_clock: int, clock: int, every: int) -> int:
    """The number of steps that Lightning's logging should believe are behind it.

    Lightning logs after the step that makes ``(position + 1) % every == 0``
    (`logger_connector.py`, ``should_update_logs``) and uses ``position`` as the x-axis. The clock is shared by all
    ranks and may pass several steps between two batches of this one, so the position is chosen such that a rank logs
    once whenever the clock has passed a multiple of ``every``.

    Examples:
        >>> [log_position(previous, clock, every=50) for previous, clock in [(48, 49), (49, 52), (52, 53), (99, 100)]]
        [48, 49, 52, 99]
        >>> log_position(100, 100, every=50)
        100
    """
    if every <= 0:
        return max(0, clock - 1)
    passed = clock // every * every
    if passed > previous_clock:
        return passed - 1
    return clock if clock % every == 0 else clock - 1
