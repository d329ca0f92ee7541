"""Where a checkpoint stands in its epoch, and how a resumed run finds the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["EpochPlace", "agree_on_order"]


@dataclass(frozen=True, slots=True)
class EpochPlace:
    """A place in an epoch: which of its tickets the parameters have been trained on.

    Args:
        epoch: number of the epoch.
        order: digest of the order that the tickets are positions in; empty where each rank has a stream of its own.
        clock: steps that the learning-rate schedulers have made; the checkpoint's version may be further.
        applied: the tickets, as ``(start, stop)`` in rising order.

    Examples:
        >>> place = EpochPlace(epoch=2, order="ab12", clock=40, applied=((0, 5), (7, 8)))
        >>> EpochPlace.load(place.state()) == place
        True
    """

    epoch: int
    order: str
    clock: int
    applied: tuple[tuple[int, int], ...]

    def state(self) -> dict[str, Any]:
        """The place in numbers and strings, as a checkpoint holds it."""
        flat = [bound for pair in self.applied for bound in pair]
        return {"epoch": self.epoch, "order": self.order, "clock": self.clock, "applied": flat}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> EpochPlace:
        """The place that `state` has put into a checkpoint."""
        flat: Sequence[int] = state["applied"]
        return cls(state["epoch"], state["order"], state["clock"], tuple(zip(flat[::2], flat[1::2], strict=True)))

    def within(self, epoch: int, matches: Callable[[str], bool]) -> EpochPlace | None:
        """This place if it is one in ``epoch``; None otherwise, with a warning if the order has changed since."""
        if self.epoch != epoch:
            return None
        if not matches(self.order):
            rank_zero_warn(
                f"The checkpoint was saved in the middle of epoch {epoch}, whose batches came in another order than "
                "now: the data, the batch size, the sampler or the seed have changed. Training goes on after as many "
                "batches as were done then, and not with exactly those that were not."
            )
            return None
        return self


def agree_on_order(orders: Sequence[str]) -> None:
    """Checks that all ranks walk one order of batches.

    Args:
        orders: each rank's digest of its order.

    Raises:
        MisconfigurationException: if one rank's is another than rank 0's.
    """
    other = next((rank for rank, order in enumerate(orders) if order != orders[0]), None)
    if other is not None:
        raise MisconfigurationException(
            f"The sampler of the train DataLoader gives rank {other} other batches than rank 0, so the ranks cannot "
            "share one epoch. Seed the sampler (with a torch.Generator of a fixed seed, for instance), change its "
            "attributes on every rank alike, or pass "
            "Trainer(use_distributed_sampler=False) to let each rank walk a loader of its own."
        )
