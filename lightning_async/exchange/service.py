"""What rank 0 asks of the service that holds the parameters and serves the workers, and what that is made from.

It is in rank 0's process (`local_service.py`), or in one of its own (`remote_service.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.layout import exchanged_parameters
from lightning_async.holder.types import Snapshot, Update
from lightning_async.runtime.handshake import Address

__all__ = ["HolderSpec", "Origins", "Service", "UpdateObserver", "parameters_of"]

UpdateObserver = Callable[[Update, tuple[int, ...]], None]

# For each parameter of each optimizer its place (optimizer, position) in what was held before; None for a new one.
Origins: TypeAlias = Sequence[Sequence[tuple[int, int] | None]]


@dataclass(frozen=True, slots=True)
class HolderSpec:
    """What is to be held, and how.

    Args:
        optimizers: to stand in for; their parameters are the initial ones.
        options: how gradients are exchanged.
        world_size: number of ranks.
        version: the version to start from.
        origins: where parameters come from that another service has held, which this one takes the place of.
        states: for each optimizer the state to begin with; None for what its parameters had in that service.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    options: ExchangeOptions
    world_size: int
    version: int
    origins: Origins | None = None
    states: Sequence[StateByPlace | None] = ()


class Service(Protocol):
    """What rank 0 asks of the holder's side, while no worker computes unless it is said otherwise."""

    @property
    def address(self) -> Address | None:
        """Where workers come in; None if rank 0 is alone."""

    def begin_epoch(self, tickets: range, block: int = 1, applied: Iterable[tuple[int, int]] = ()) -> None:
        """Starts an epoch; see `Ledger.begin_epoch`."""

    def regroup(self, block: int, equal_shares: bool) -> None:
        """Deals what is left of the epoch anew; see `Ledger.regroup`."""

    def evict(self, worker: int) -> int:
        """Takes a worker out of the run, at any time; returns how many tickets others get in its place."""

    def let_in(self, worker: int) -> None:
        """Has a worker come that was evicted, or comes in addition; at any time. It takes part once it is admitted."""

    def admit(self, worker: int) -> None:
        """Has such a worker take part; at any time."""

    def open(self, tickets: int, ranks: Sequence[int] | None = None) -> None:
        """Opens a segment of the next ``tickets`` tickets.

        Args:
            tickets: how many.
            ranks: those in the run; None if they are those that it began with.
        """

    def progress(self) -> tuple[int, int]:
        """``(applied, not yet handed out)``: how many tickets of this epoch; at any time."""

    def unfinished(self) -> int:
        """Number of tickets of this epoch that are not applied; at any time."""

    def settle(self) -> None:
        """Returns when all updates that were answered have been told; at any time."""

    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        """Takes over parameters that differ from the holder's; see `Holder.load_parameters`."""

    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        """Takes over optimizer states that differ from the holder's; see `Holder.load_states`."""

    def optimizer_state(self, index: int) -> StateByPlace:
        """A copy of what one optimizer keeps, by the places of its parameters; at any time."""

    def take_adapted(self) -> list[list[dict[str, Any]]]:
        """For each optimizer and param group the values that its own steps have changed."""

    def snapshot(self) -> Snapshot:
        """Parameters, optimizer states and applied tickets of one version; at any time."""

    def complete_version(self) -> bool:
        """Makes an update of the gradients that wait for more, if any; see `Holder.complete_version`."""

    def restore(
        self,
        version: int,
        optimizer_states: Sequence[Mapping[str, Any]],
        gathered: Gathered | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> bool:
        """Loads optimizer states, in torch's format, and the version; see `Holder.restore`."""

    def adjust(self, options: ExchangeOptions) -> None:
        """Goes on with another number of gradients in an update, another bound and policy, at a version's border.

        Raises:
            ValueError: if gradients wait for more.
        """

    def set_counts(self, counts: Sequence[int]) -> None:
        """Sets what all workers have counted so far."""

    def save_on_loss(self, snapshot: str, segment: str) -> bool:
        """Has what is held left for the job's next start if rank 0 is lost; see `LastState`.

        Args:
            snapshot: the file of the run's snapshots, which it is left beside.
            segment: a name, of which the snapshots tell, too, for what is held from here until anything but a push
                changes it.

        Returns:
            Whether it will be: what is in rank 0's own process is lost with it.
        """
        return False

    def expect_snapshot(self, segment: str) -> None:
        """The segment's snapshot is being written, so that the state in which it ends may be what is gone on from.

        Args:
            segment: its name.
        """
        return

    def note_saved(self, segment: str) -> None:
        """The segment's snapshot is on the disk: what was kept of the segment before it is of no use any more.

        Args:
            segment: its name.
        """
        return

    def close(self) -> None:
        """Waits until all workers have said goodbye, a few seconds at most, and serves nobody any more."""


def parameters_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[Tensor]]:
    """Each optimizer's parameters that travel, in the order of its groups."""
    return [exchanged_parameters(optimizer) for optimizer in optimizers]
