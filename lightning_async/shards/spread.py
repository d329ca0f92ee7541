"""Shards that are spread over hosts: which is where, and one rank's part in them.

Shard 0 is in rank 0's process and gives every gradient its place. Each other one has a process of its own, which the
first rank of its host has started, and that rank 0 and all workers reach over the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.exchange.dial import policy_and_momentum
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.parted_channel import PartConnection, PartedChannel, SequencedChannel
from lightning_async.exchange.service import parameters_of
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.placement import HolderPlacement
from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.runtime.handshake import CONTROL, Address, HandshakeError, handshake
from lightning_async.runtime.outward import address_towards
from lightning_async.runtime.rendezvous import LOOPBACK
from lightning_async.shards.arrivals import Arrivals
from lightning_async.shards.placement import ShardedPlacement, spec_of
from lightning_async.shards.plan import ShardPlan, plan_shards
from lightning_async.shards.remote import RemoteShard
from lightning_async.shards.sequencer import SequencingHolder
from lightning_async.shards.shard_process import ShardServerProcess
from lightning_async.shards.template import check_can_be_cut, cuts_parameters
from lightning_async.transport.base import Buffers, Channel, ChannelClosedError
from lightning_async.transport.message import Message

__all__ = ["ShardSite", "SpreadPlacement", "SpreadShards", "shards_of_host"]


def shards_of_host(shards: int, host: int, hosts: int) -> list[int]:
    """Which shards have a process on a host; the first shard, in rank 0's process, has none.

    Args:
        shards: their number S.
        host: number of the host, whose first rank starts them.
        hosts: their number.

    Examples:
        >>> [shards_of_host(4, host, hosts=2) for host in (0, 1)], shards_of_host(2, 2, hosts=3)
        ([[2], [1, 3]], [])
    """
    return [shard for shard in range(1, shards) if shard % hosts == host]


@dataclass(frozen=True, slots=True)
class ShardSite:
    """Where a shard is.

    Args:
        shard: its number.
        rank: the rank that has started its process.
        address: of its listener.
    """

    shard: int
    rank: int
    address: Address


class SpreadPlacement(ShardedPlacement):
    """Puts a holder's first shard into rank 0's process, and the others where they are reached over the network.

    Args:
        shards: rank 0's connections to the shards 1, 2, ...
        options: how gradients are exchanged.
        workers: number of ranks.
    """

    def __init__(self, shards: Sequence[RemoteShard], options: ExchangeOptions, workers: int) -> None:
        super().__init__(shards, options, workers)
        self.needs_memory = ""
        self._shards = shards
        self._arrivals: Arrivals | None = None
        self._own = slice(0, 0)

    @override
    def make_holder(self, *arguments: Any, **more: Any) -> Holder:
        holder = super().make_holder(*arguments, **more)
        if isinstance(holder, SequencingHolder):
            self._own = holder.plan.part(0)
            latch: FailureLatch = arguments[4]
            self._arrivals = Arrivals(range(1, holder.plan.count), latch)
            for shard in self._shards[: holder.plan.count - 1]:
                shard.note_parts_in(self._arrivals)
        return holder

    @override
    def buffers(self, numel: int, dtype: torch.dtype) -> Buffers:
        return HolderPlacement.buffers(self, numel, dtype)

    @override
    def stage(self, channel: Channel, worker: int) -> Channel:
        arrivals = self._arrivals
        if self._holder is None or arrivals is None:
            return channel
        # The worker has come to the other shards before.
        self._holder.attach(worker, 0, "", channel.buffers)
        return SequencedChannel(channel, self._own, lambda number: arrivals.wait(worker, number))

    @override
    def deliver(self, channel: Channel, message: Message, parameters: Tensor) -> None:
        # The worker waits for the other parts itself.
        channel.send(message, parameters)


class SpreadShards:
    """One rank's part in shards that are spread over hosts.

    Args:
        rank: this rank.
        workers: number of ranks.
        options: how gradients are exchanged.
        latch: the run's failure latch.
        processes: those of the shards that this rank has started.
        holder: where rank 0 listens, with the run's token.
        gather: gives every rank each rank's string, for anyone to read; a collective call.

    Attributes:
        remotes: rank 0's connections to the shards but the first; none on other ranks.

    Raises:
        ShardProcessError: if a process of this rank's has not started.
    """

    def __init__(
        self,
        rank: int,
        workers: int,
        options: ExchangeOptions,
        latch: FailureLatch,
        processes: Sequence[ShardServerProcess],
        holder: Address,
        gather: Callable[[str], list[str]],
    ) -> None:
        self._rank = rank
        self._workers = workers
        self._options = options
        self._latch = latch
        self._processes = processes
        self._number = 0
        self._plan: ShardPlan | None = None
        host = holder.host
        if processes and rank != 0 and host != LOOPBACK:
            host = address_towards(holder.host)
        own = [
            [process.shard, process.listen(host, workers, holder.timeout_s, holder.token, latch).as_json()]
            for process in processes
        ]
        sites = [
            ShardSite(shard, of_rank, replace(Address.from_json(told), token=holder.token))
            for of_rank, text in enumerate(gather(json.dumps(own)))
            for shard, told in json.loads(text)
        ]
        self._sites = sorted(sites, key=lambda site: site.shard)
        self.remotes = [RemoteShard(site.shard, site.rank, site.address) for site in self._sites] if rank == 0 else []

    def prepare(self, optimizers: Sequence[torch.optim.Optimizer], version: int) -> None:
        """Makes ready what an engine for these optimizers needs; on all ranks.

        Args:
            optimizers: the module's.
            version: the version to start from.

        Raises:
            ValueError: if they cannot be cut; the message says what can be had.
        """
        check_can_be_cut(optimizers)
        (optimizer,) = optimizers
        layout = FlatLayout(parameters_of(optimizers))
        plan = plan_shards(layout.shapes[0], self._options.holder_shards, cuts_parameters(optimizer))
        self._number += 1
        self._plan = plan
        options = self._options
        policy, _ = policy_and_momentum(options, optimizers, self._workers)
        # Rank 0's bound and version are what counts.
        barrier = StalenessBarrier(None, options.on_stale, version, options.gradients_per_update)
        for process in self._processes:
            if process.shard < plan.count:
                values = layout.buffer()
                arguments = (optimizer, barrier, policy, None, options, self._workers)
                process.offer(self._number, spec_of(plan, process.shard, values, *arguments))

    def placement(self) -> SpreadPlacement | None:
        """Where the holder is, on rank 0; None elsewhere."""
        return SpreadPlacement(self.remotes, self._options, self._workers) if self._rank == 0 else None

    def connect(self, dial: Callable[[], Channel]) -> Channel:
        """Connects this rank's worker to all shards.

        Args:
            dial: connects it to rank 0's session.

        Raises:
            HandshakeError: if a shard refuses it, with its reason.
            ChannelClosedError: if one cannot be reached.
        """
        plan = self._plan
        assert plan is not None
        parts: list[PartConnection] = []
        # Before rank 0 serves it, so that its memory is there in every shard.
        for site in self._sites[: plan.count - 1]:
            try:
                connection, _ = handshake(site.address, self._rank, CONTROL, follower=self._number)
            except (HandshakeError, ChannelClosedError) as error:
                where = f"shard {site.shard} of the holder, on the host of rank {site.rank}"
                raise type(error)(f"{where}: {error}") from error
            place = plan.part(site.shard)
            parts.append(PartConnection(self._rank, site.shard, place, connection, site.address.timeout_s))
        inner = dial()
        if not parts:
            return inner
        channel = PartedChannel(inner, plan.part(0), parts, self._lose)
        self._latch.subscribe(lambda failure: channel.break_off())
        return channel

    def end(self) -> None:
        """Lets go of the shards, on rank 0."""
        for remote in self.remotes:
            remote.end()

    def _lose(self, shard: int, reason: str) -> None:
        site = next(site for site in self._sites if site.shard == shard)
        text = f"its process for shard {shard} of the holder is lost by rank {self._rank}: {reason}"
        self._latch.explain_loss(lambda: RunFailure(site.rank, text))
