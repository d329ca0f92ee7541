"""A fit's engine: built when the fit begins, and built anew when user code has changed the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_async.exchange.dial import RunDial
from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.param_views import UnsupportedGradientError
from lightning_async.exchange.service import Service, UpdateObserver
from lightning_async.exchange.worker import Worker
from lightning_async.holder.placement import HolderPlacement
from lightning_async.loops.buffer_sync import check_ignored
from lightning_async.loops.protocols import Collectives
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.admission import Admission
from lightning_async.shards.placement import ShardedPlacement
from lightning_async.shards.spread import SpreadShards
from lightning_async.shards.template import check_can_be_cut
from lightning_async.strategies.by_hand import ByHand
from lightning_async.strategies.optimizer_proxy import agree_on_optimizers, place_in
from lightning_async.strategies.supervisor import RunSupervisor
from lightning_async.strategies.validation import check_module, check_parameters, describe_gradient
from lightning_async.transport.devices import RankDevices, describe_device, place_holder

__all__ = ["ExchangeContext", "GradientExchange"]


@dataclass(frozen=True)
class ExchangeContext:
    """What an engine is built from that stays the same for the whole fit.

    Args:
        name: the strategy's name, for messages.
        module: the module that is trained.
        dial: how gradients are exchanged, which may change where the ranks meet.
        rank: this rank.
        world_size: number of ranks N.
        device: where this rank computes.
        collectives: the strategy's own.
        meet: gives every rank rank 0's string, in the default process group.
        supervisor: knows the run's failure, rank 0's listener and the holder's own process.
        stats: collects what happens, on rank 0.
        observers: called on rank 0 with each update.
        spare_threads: how many the holder may have beside this host's ranks.
        num_nodes: number of hosts that the ranks are on.
    """

    name: str
    module: LightningModule
    dial: RunDial
    rank: int
    world_size: int
    device: torch.device
    collectives: Collectives
    meet: Callable[[str], str]
    supervisor: RunSupervisor
    stats: RunStats
    observers: Sequence[UpdateObserver]
    spare_threads: int = 1
    num_nodes: int = 1

    @property
    def options(self) -> ExchangeOptions:
        """How gradients are exchanged at present."""
        return self.dial.options


class GradientExchange:
    """This rank's part of the exchange in one fit.

    Args:
        context: what stays the same.
        optimizers: tells the module's optimizers, which user code may replace where the ranks meet.
        take: makes an optimizer's step push.
        by_hand: what user code does by hand.
        version: the version to start from.

    Attributes:
        engine: the present engine.
    """

    def __init__(
        self,
        context: ExchangeContext,
        optimizers: Callable[[], list[Optimizer]],
        take: Callable[[Optimizer], None],
        by_hand: ByHand,
        version: int,
    ) -> None:
        self._context = context
        self._optimizers = optimizers
        self._take = take
        self._by_hand = by_hand
        self._spread: SpreadShards | None = None
        self.engine = self._build(version)

    @property
    def worker(self) -> Worker:
        """This rank's worker."""
        return self.engine.worker

    @property
    def averages(self) -> bool:
        """Whether several gradients make an update."""
        return self.options.gradients_per_update > 1

    @property
    def dial(self) -> RunDial:
        """What "auto" measures and chooses."""
        return self._context.dial

    @property
    def options(self) -> ExchangeOptions:
        """How gradients are exchanged at present."""
        return self._context.options

    def load_dial(self, saved: Mapping[str, Any]) -> None:
        """Goes on with what "auto" has chosen, or measured, in the run that a checkpoint is from."""
        before = self.options
        self.dial.load(saved)
        if self.options != before:
            self._adjust()

    def follow_dial(self, version: int) -> None:
        """Lets the holder go on as the dial has chosen; nobody computes, and no gradient waits for more.

        Args:
            version: the holder's.
        """
        self.dial.begin_at(version)
        self._adjust()

    def _adjust(self) -> None:
        if self.engine.service is not None:
            self.engine.service.adjust(self.options)

    def push(self, optimizer: Optimizer) -> None:
        """Pushes an optimizer's gradients, and takes fresh parameters for them.

        Raises:
            MisconfigurationException: if it is none of the trainer's, or a gradient cannot be exchanged.
        """
        index = place_in(self.engine, optimizer)
        self.engine.states.check_untouched()
        self._by_hand.before_push(index, len(self._optimizers()), self.worker.version)
        try:
            self.worker.step(index)
        except UnsupportedGradientError as error:
            raise MisconfigurationException(describe_gradient(self._context.module, error.parameter)) from error
        self._by_hand.after_push()

    def evict(self, worker: int, reason: str) -> str | None:
        """Takes a worker out of the exchange, at any time; returns what the others get of it, in words."""
        service = self.engine.service
        assert service is not None
        self._context.stats.evict(worker)
        returned = service.evict(worker)
        if not returned:
            return None
        batches = "batch is" if returned == 1 else f"{returned} batches are"
        return f"its unfinished {batches} handed out again"

    def receive(self, admission: Admission) -> None:
        """Has workers that join come to the holder."""

        def service() -> Service:
            assert self.engine.service is not None
            return self.engine.service

        def admit(worker: int) -> None:
            self._context.stats.join(worker)
            service().admit(worker)

        admission.exchange = service().address
        admission.let_in = lambda worker: service().let_in(worker)
        admission.admit = admit

    def follow_user_code(self) -> None:
        """Takes over what hooks between segments did to parameters, optimizers and their states; a collective call."""
        engine, optimizers, collectives = self.engine, self._optimizers(), self._context.collectives
        agree_on_optimizers(optimizers, engine, collectives.gather_objects)
        engine.load_parameters()
        if engine.owns(optimizers):
            engine.load_states()
            return
        for optimizer in optimizers:
            if engine.place_of(optimizer) is None:
                self._take(optimizer)
        engine.release_states(kept=optimizers)
        # Rank 0 must not shut the listener on a rank that is still on its way to this engine.
        collectives.barrier("optimizers or param groups have changed")
        engine.close()
        self.engine = self._build(engine.worker.version, predecessor=engine)
        self.worker.on_span = engine.worker.on_span
        self.worker.tally = engine.worker.tally

    def close(self) -> None:
        """Gives the optimizers a state of their own again, and ends this rank's part."""
        self.engine.release_states()
        self.engine.close()

    def _build(self, version: int, predecessor: Engine | None = None) -> Engine:
        context, optimizers = self._context, self._optimizers()
        try:
            check_module(context.module)
            check_ignored(context.module, optimizers)
            check_parameters(context.module, optimizers)
            if self.options.shards(context.world_size) > 1:
                check_can_be_cut(optimizers)
            if self._spread is None and self.options.spreads(context.world_size, context.num_nodes):
                self._spread = self._spread_shards()
            spread = self._spread
            if spread is not None:
                spread.prepare(optimizers, version)
            return Engine(
                rank=context.rank,
                world_size=context.world_size,
                optimizers=optimizers,
                options=self._resolved_options(),
                latch=context.supervisor.latch,
                listener=context.supervisor.listener,
                stats=context.stats,
                observers=context.observers,
                version=version,
                meet=lambda address: context.supervisor.share(address, context.meet),
                predecessor=predecessor,
                devices=self._devices(),
                process=context.supervisor.holder_process,
                placement=self._placement() if spread is None else spread.placement(),
                on_lost=context.supervisor.on_lost,
                incarnation=context.supervisor.membership.incarnation,
                connect=None if spread is None else spread.connect,
            )
        except ValueError as error:
            raise MisconfigurationException(f"{context.name} cannot train this module: {error}") from error

    def _resolved_options(self) -> ExchangeOptions:
        options, context = self.options, self._context
        if options.spreads(context.world_size, context.num_nodes):
            # On its own host, too, a worker goes to each shard in one way.
            options = replace(options, transport="tcp")
        if options.holder_threads != "auto":
            return options
        in_shards = options.shards(context.world_size) > 1
        return replace(options, holder_threads=1 if in_shards else self._context.spare_threads)

    def _placement(self) -> HolderPlacement | None:
        """Where the holder is, on rank 0 where it is in several processes; None elsewhere."""
        processes = self._context.supervisor.shard_processes
        return ShardedPlacement(processes, self.options, self._context.world_size) if processes else None

    def _spread_shards(self) -> SpreadShards:
        """This rank's part in shards that are reached over the network; a collective call."""
        context, supervisor = self._context, self._context.supervisor
        address = supervisor.membership.address
        assert address is not None
        spread = SpreadShards(
            context.rank,
            context.world_size,
            self.options,
            supervisor.latch,
            supervisor.shard_servers,
            address,
            context.collectives.gather_objects,
        )
        supervisor.let_go_of_shards = spread.end
        return spread

    def _devices(self) -> RankDevices:
        """Where this rank computes and where the holder lives; a collective call if there are GPUs."""
        options, own = self.options, self._context.device
        mine = describe_device(own)
        on_host = options.holder == "process" or options.shards(self._context.world_size) > 1
        choice = "cpu" if on_host else options.holder_device
        everyone = () if mine is None else self._context.collectives.gather_objects(mine)
        try:
            # Asked on every rank, so that all of them refuse what cannot be.
            return RankDevices(own, mine, place_holder(choice, options.transport, everyone))
        except ValueError as error:
            raise MisconfigurationException(f"{error}.") from error
