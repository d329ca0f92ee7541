"""How many batches an epoch has, over all ranks, as the ranks agree on it. Below `loops.py`, above `fetcher.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_async.internals.fetcher import TicketFetcher
from lightning_async.ranges import UNBOUNDED

__all__ = ["agree_on_size", "epoch_size"]


def agree_on_size(trainer: Trainer, fetcher: TicketFetcher, gather: Callable[[Any], list[Any]]) -> None:
    """Gives every rank the same size of the epoch where each has a stream of its own; a collective call.

    An epoch takes every stream to its end, or as many batches per rank as the trainer's limit says. If streams are
    unlike in length, the longest decides what the trainer shows as the number of batches, and there are as many tickets
    as there are batches.

    Args:
        trainer: the trainer; its fit loop has just been given its data.
        fetcher: this rank's fetcher, which learns the number of tickets.
        gather: collects an object from every rank.
    """
    fit_loop: Any = trainer.fit_loop
    settings: Any = trainer
    mine = (fit_loop.max_batches, fetcher.stream_length, settings.val_check_batch, fit_loop._last_train_dl_reload_epoch)
    everyone = gather(mine)
    longest = max(range(len(everyone)), key=lambda rank: everyone[rank][0])
    # A rank without a single batch has left these as they were.
    fit_loop.max_batches, _, settings.val_check_batch, fit_loop._last_train_dl_reload_epoch = everyone[longest]
    lengths = [length for _, length, _, _ in everyone]
    fetcher.tickets = UNBOUNDED
    if fit_loop.max_batches != float("inf"):
        fetcher.tickets = int(fit_loop.max_batches) * trainer.world_size
        if None not in lengths:
            fetcher.tickets = min(fetcher.tickets, sum(lengths))


def epoch_size(trainer: Trainer, fetcher: TicketFetcher) -> tuple[int, int]:
    """``(batches per rank, tickets)`` of an epoch; `UNBOUNDED` where the streams' end is not known."""
    if fetcher.is_shared:
        batches = int(trainer.num_training_batches)
        return batches, min(fetcher.shared_batches, batches * trainer.world_size)
    tickets = fetcher.tickets
    if tickets == UNBOUNDED:
        return UNBOUNDED, UNBOUNDED
    return int(trainer.num_training_batches), tickets
