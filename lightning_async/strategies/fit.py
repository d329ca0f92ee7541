"""The parts of one fit, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_async.loops.buffer_sync import BufferSync, check_averaged, share_module
from lightning_async.loops.installation import InstalledLoops
from lightning_async.loops.phase import Phase
from lightning_async.loops.protocols import RunSignals
from lightning_async.loops.trainer_state import logger_prefix
from lightning_async.monitoring.loggers import writer_for
from lightning_async.monitoring.metrics import MetricsLogger
from lightning_async.strategies.by_hand import ByHand
from lightning_async.strategies.checkpointing import Checkpointing
from lightning_async.strategies.clock import SharedClock
from lightning_async.strategies.coordinator import Coordinator
from lightning_async.strategies.gradient_exchange import ExchangeContext, GradientExchange
from lightning_async.strategies.joining import Joining
from lightning_async.strategies.resolved import Resolved
from lightning_async.strategies.snapshots import Snapshots

__all__ = ["Fit", "set_up_fit"]


@dataclass(frozen=True)
class Fit:
    """The parts of one fit on this rank.

    Args:
        exchange: this rank's part of the exchange.
        by_hand: what user code does by hand.
        clock: the counts that all ranks share.
        checkpointing: puts checkpoints together and loads them.
        coordinator: brings the ranks together between segments.
        metrics: logs the ``async/`` metrics, on rank 0; None without a logger.
    """

    exchange: GradientExchange
    by_hand: ByHand
    clock: SharedClock
    checkpointing: Checkpointing
    coordinator: Coordinator
    metrics: MetricsLogger | None


def set_up_fit(
    context: ExchangeContext,
    trainer: Trainer,
    optimizers: Callable[[], list[Optimizer]],
    take: Callable[[Optimizer], None],
    gradients: int,
    phase: Phase,
    loops: InstalledLoops,
    signals: RunSignals,
    resolve: Callable[[Resolved], dict[str, Any]],
    on_joined: Callable[[], None] = lambda: None,
    snapshots: Snapshots | None = None,
) -> Fit:
    """Gives all ranks one module, and builds the parts of a fit; a collective call.

    Args:
        context: what an engine is built from.
        trainer: the trainer.
        optimizers: tells the module's optimizers.
        take: makes an optimizer's step push.
        gradients: how many have been applied before.
        phase: the run's phase.
        loops: the trainer's loops, which follow the coordinator from here on.
        signals: what signals have asked for.
        resolve: told what the ranks found when they met; tells how the run exchanges gradients, for the loggers.
        on_joined: called when this rank has joined a fit that is under way.
        snapshots: those of the run, on rank 0.

    Raises:
        MisconfigurationException: if the ranks have built different modules, or the module cannot be exchanged.
    """
    # What may fail comes before the engine, which would be left open.
    buffers = _share(context)
    metrics: MetricsLogger | None = None
    if context.rank == 0 and trainer.loggers:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        writers = [writer_for(logger, logger_prefix) for logger in trainer.loggers]
        metrics = MetricsLogger(context.stats, writers, every)
    gradients_per_update = context.options.gradients_per_update
    version = gradients // gradients_per_update
    by_hand = ByHand(
        trainer, context.name, gradients, phase, context.world_size, counts_gradients=gradients_per_update > 1
    )
    exchange = GradientExchange(context, optimizers, take, by_hand, version)
    membership = context.supervisor.membership
    context.supervisor.on_eviction(exchange.evict)
    joining = None if membership.joining is None else Joining(trainer, membership, exchange, by_hand)
    if membership.admission is not None:
        exchange.receive(membership.admission)
    transports = context.collectives.gather_objects(exchange.engine.transport)
    clock = SharedClock(
        lambda: exchange.worker.version,
        context.world_size,
        by_hand,
        accumulate=lambda: int(trainer.accumulate_grad_batches),
    )
    checkpointing = Checkpointing(context.module, exchange, clock, by_hand, phase, lambda: loops.scheduled_steps)
    coordinator = Coordinator(
        trainer=trainer,
        collectives=context.collectives,
        phase=phase,
        exchange=exchange,
        clock=clock,
        by_hand=by_hand,
        checkpointing=checkpointing,
        stats=context.stats,
        metrics=metrics,
        metric_sync=loops.metrics,
        buffers=buffers,
        sigterm_received=lambda: signals.sigterm_received,
        supervisor=context.supervisor,
        joining=joining,
        on_joined=on_joined,
        snapshots=snapshots,
        resolve=lambda source: resolve(
            Resolved(transports, exchange.engine.holder_device, source, exchange.engine.holder_threads)
        ),
    )
    loops.follow(coordinator)
    return Fit(exchange, by_hand, clock, checkpointing, coordinator, metrics)


def _share(context: ExchangeContext) -> BufferSync | None:
    """Gives every rank rank 0's parameters and buffers; returns what keeps the buffers alike, if there are several."""
    module: LightningModule = context.module
    gather = context.collectives.gather_objects
    try:
        check_averaged(module)
        if context.world_size == 1:
            return None
        if context.supervisor.membership.joining is None:
            share_module(module, gather)
    except ValueError as error:
        raise MisconfigurationException(f"{context.name} cannot train this module: {error}.") from error
    return BufferSync(module, gather, context.rank)
