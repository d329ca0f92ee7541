"""How many batches an epoch has, over all ranks, as the ranks agree on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_async.data.ranges import UNBOUNDED
from lightning_async.loops.fetcher import TicketFetcher

__all__ = ["agree_on_size", "epoch_size"]


def agree_on_size(trainer: Trainer, gather: Callable[[Any], list[Any]]) -> None:
    """Gives every rank the same size of the epoch where each has a stream of its own; a collective call.

    An epoch takes every stream to its end, or as many batches per rank as the trainer's limit says. If streams are
    unlike in length, the longest one's is taken for all: tickets that no stream has a batch for are left over.

    Args:
        trainer: the trainer; its fit loop has just been given its data.
        gather: collects an object from every rank.
    """
    fit_loop: Any = trainer.fit_loop
    untyped: Any = trainer
    mine = (fit_loop.max_batches, untyped.val_check_batch, fit_loop._last_train_dl_reload_epoch)
    longest = max(gather(mine), key=lambda theirs: theirs[0])
    # A rank without a single batch has left the others as they were.
    fit_loop.max_batches, untyped.val_check_batch, fit_loop._last_train_dl_reload_epoch = longest


def epoch_size(trainer: Trainer, fetcher: TicketFetcher, ranks: int) -> tuple[int, int]:
    """``(batches per rank, tickets)`` of an epoch; `UNBOUNDED` where the streams' end is not known.

    Args:
        trainer: the trainer.
        fetcher: of its train batches.
        ranks: the number of ranks N that "per rank" is about.
    """
    if trainer.num_training_batches == float("inf"):
        return UNBOUNDED, UNBOUNDED
    batches = int(trainer.num_training_batches)
    tickets = batches * ranks
    return batches, min(tickets, fetcher.shared_batches) if fetcher.is_shared else tickets
