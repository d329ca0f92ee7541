"""What the loops need of the rest, so that they know neither strategy nor exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

__all__ = ["BatchSource", "Clock", "Collectives", "Coordinator", "RunSignals", "SegmentEnd", "Snapshot"]

_T = TypeVar("_T")


class Collectives(Protocol):
    """Collective calls of the strategy's own, which every rank makes in the synchronous phase."""

    def gather_objects(self, mine: _T) -> list[_T]:
        """Every rank's object, in the order of ranks."""

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """Rank ``src``'s object."""

    def barrier(self, name: str | None = None) -> None:
        """Waits for all ranks."""

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """A value reduced over the ranks."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The ranks' common decision."""

    @property
    def nominal_world_size(self) -> int:
        """The number of ranks that the run was started with, N: clock, epochs and bounds go by it."""

    @property
    def ranks_present(self) -> Sequence[int]:
        """The ranks that took part in the last meeting, by the numbers that they have in the exchange."""

    @property
    def outlives_ranks(self) -> bool:
        """Whether the run goes on without ranks that it loses."""

    def follow_roster(self) -> None:
        """Gives the ranks in the run a process group of their own, if the present one has others; a collective call."""

    def take_changed_members(self) -> bool:
        """Whether other ranks are in the process group than when this was last asked."""

    def repeat_if_lost(self, body: Callable[[], None], restore: Callable[[], None]) -> None:
        """Runs a part of the synchronous phase, and again, after ``restore``, if a rank was lost in it."""


class BatchSource(Protocol):
    """Where this rank's batches come from: it draws tickets, and each of them is a batch."""

    @property
    def has_unreported_batches(self) -> bool:
        """Whether batches were computed since the last push."""

    def draw(self) -> range:
        """Draws the next tickets; empty if this rank's segment is over."""

    def release(self, tickets: int, stream_over: bool) -> None:
        """Returns the newest tickets drawn, which there are no batches for."""

    def leave_out(self, tickets: int) -> None:
        """Notes batches that the loader has left out: they count as done."""

    def stop_dispatch(self) -> None:
        """Ends the segment for every rank once the batches that are being computed are done."""


class Snapshot(Protocol):
    """What a checkpoint consists of, as far as the loops are concerned."""

    @property
    def applied(self) -> Sequence[tuple[int, int]]:
        """The epoch's applied tickets, as ``(start, stop)`` in rising order."""


class Clock(Protocol):
    """Counts of steps and batches that all ranks share."""

    @property
    def step(self) -> int:
        """Steps per rank: what ``trainer.global_step`` shows."""

    @property
    def log_step(self) -> int:
        """What loggers take as their x-axis."""

    @property
    def block(self) -> int:
        """Batches that make one update, which go to one rank; 1 while nobody knows."""

    @property
    def steps_of_all_ranks(self) -> tuple[int, int]:
        """Steps of all ranks so far, as the trainer counts them, and the most that one block of batches makes."""

    @property
    def must_learn(self) -> bool:
        """Whether the next segment is to show how many batches make a step."""

    @property
    def has_learned(self) -> bool:
        """Whether this rank has seen it."""

    def restart(self) -> None:
        """Takes Lightning's own count of steps, which was set to that of all ranks, as the new beginning."""


@dataclass(frozen=True, slots=True)
class SegmentEnd:
    """What all ranks know when they have met at the end of a segment.

    Args:
        tickets_done: batches of this epoch that are applied.
        tickets_left: batches of this epoch that no rank was handed.
        validation_requested: a rank asked for validation now.
        skip_rest: a rank wants to skip the rest of the epoch.
    """

    tickets_done: int
    tickets_left: int
    validation_requested: bool
    skip_rest: bool


class Coordinator(Protocol):
    """Brings the ranks together between segments, and lets them part again."""

    @property
    def clock(self) -> Clock:
        """The counts that all ranks share."""

    @property
    def batches(self) -> BatchSource:
        """This rank's source of batches."""

    @property
    def steps_to_measure(self) -> int | None:
        """After how many steps of each rank the ranks are to meet, since step times are measured; None if not."""

    @property
    def unfinished_tickets(self) -> int:
        """Batches of this epoch, over all ranks, that are not finished; known on rank 0."""

    @property
    def stepped_plateaus(self) -> list[Any]:
        """Plateau schedulers that user code has stepped while the ranks trained."""

    @property
    def snapshot_between_batches(self) -> tuple[Snapshot, int] | None:
        """What a checkpoint consists of that is put together while the ranks train, and its step; else None."""

    def begin_epoch(self, tickets: int, order: str, tickets_done: int, matches: Callable[[str], bool]) -> Any:
        """Fills the ledger with what is left of an epoch; returns the place that a checkpoint has recorded, if any."""

    def compare_orders(self, digests: list[str]) -> None:
        """Checks that what the ranks have drawn further of a long epoch is one order; a collective call."""

    def enter_segment(self, tickets: int, equal_shares: bool = False) -> None:
        """Opens a segment of ``tickets`` batches over all ranks; a collective call, the last one until it is over."""

    @property
    def joins(self) -> bool:
        """Whether this rank is about to join a fit that is under way."""

    def take_state(self) -> bool:
        """Takes over what the others know of the segment under way, to join it; False if the run is over."""

    def join_segment(self, order: str) -> Any:
        """Joins the segment whose state was taken over; returns where the ranks stand in its epoch.

        Args:
            order: digest of this rank's order of batches.

        Raises:
            SegmentOverError: if it has ended.
        """

    @property
    def may_leave(self) -> bool:
        """Whether the others go on without this rank, if it is told to end."""

    def leave_run(self) -> None:
        """Leaves the others to go on: what this rank was handed and has not finished is theirs.

        Raises:
            SystemExit: always.
        """

    def open_admission(self) -> None:
        """Lets ranks join the segment that has begun."""

    def begin_batch(self, samples: int) -> None:
        """Notes that this rank computes a batch; waits for parameters if it holds none."""

    def take_snapshot(self) -> None:
        """Takes a snapshot of the run, if one is due and this is rank 0; as between batches."""

    def leave_segment(self, validation_requested: bool, skip_rest: bool) -> SegmentEnd:
        """Pushes what is left, waits for all ranks, and gives them the holder's parameters and common decisions."""

    def share_buffers(self, batches: int, batches_as_ddp: int) -> None:
        """Gives every rank the same buffers after a segment; a collective call."""

    def save_on_rank_zero(self, save: Callable[[], None]) -> None:
        """Runs ``save`` on rank 0, as between batches; all ranks' checkpoint callbacks note the same."""

    def log_metrics(self, step: int) -> None:
        """Writes the ``async/`` metrics, on rank 0."""


class RunSignals(Protocol):
    """What the operating system's signals ask of a run; answered between two batches.

    Attributes:
        sigterm_received: whether this rank was told to end gracefully.
        requeue: saves and requeues the job, once SLURM has asked for it.
        saves: the checkpoints that user code has asked for where none could be saved, in a signal's handler.
    """

    sigterm_received: bool
    requeue: Callable[[], None] | None
    saves: list[Callable[[], None]]

    def save(self) -> None:
        """Saves what `saves` has; no collective may be needed for it."""

    def pass_on(self, signum: int) -> None:
        """Sends a signal on to the ranks that were started from here."""
