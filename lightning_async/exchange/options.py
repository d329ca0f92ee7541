"""The strategy's arguments, validated once, at the entrance."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lightning_async.data.ledger import Batches
from lightning_async.holder.barrier_policies import OnStale
from lightning_async.holder.staleness import MaxStaleness
from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.momentum import MomentumCorrection, check_momentum_correction
from lightning_async.policies.registry import make_policy
from lightning_async.transport.devices import HolderDevice

__all__ = [
    "Batches",
    "ExchangeOptions",
    "HolderDevice",
    "HolderPlace",
    "HolderThreads",
    "MaxStaleness",
    "MomentumCorrection",
    "OnStale",
    "StalenessPolicy",
    "Transport",
    "WireDtype",
]

Transport: TypeAlias = Literal["auto", "shm", "tcp", "nccl"]
WireDtype: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
HolderPlace: TypeAlias = Literal["thread", "process"]
HolderThreads: TypeAlias = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """How gradients are exchanged; `AsyncStrategy` says what each choice does.

    Raises:
        ValueError: if a value has no meaning; the message says which have.

    Examples:
        >>> ExchangeOptions(max_staleness=-1)
        Traceback (most recent call last):
        ValueError: max_staleness must be an int of at least 0, "auto" (4 per rank) or None (no bound), not -1.
    """

    max_staleness: MaxStaleness = "auto"
    on_stale: OnStale = "wait"
    batches: Batches = "shared"
    transport: Transport = "auto"
    worker_timeout_s: float = 60.0
    overlap: bool = False
    wire_dtype: WireDtype = "fp32"
    parameter_wire_dtype: WireDtype = "fp32"
    holder_device: HolderDevice = "auto"
    holder: HolderPlace = "thread"
    holder_threads: HolderThreads = "auto"
    holder_shards: int = 1
    gradients_per_update: int = 1
    staleness_policy: str | StalenessPolicy = "plain"
    momentum_correction: MomentumCorrection = None
    reject_nonfinite: bool = True
    max_rejected_in_a_row: int = 10
    step_timeout_s: float | None = None
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        bound: object = self.max_staleness
        is_bound = isinstance(bound, int) and not isinstance(bound, bool) and bound >= 0
        if not (is_bound or bound is None or bound == "auto"):
            raise ValueError(
                f'max_staleness must be an int of at least 0, "auto" (4 per rank) or None (no bound), not {bound!r}.'
            )
        make_policy(self.staleness_policy)
        check_momentum_correction(self.momentum_correction)
        choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("on_stale", self.on_stale, get_args(OnStale)),
            ("batches", self.batches, get_args(Batches)),
            ("transport", self.transport, get_args(Transport)),
            ("holder_device", self.holder_device, get_args(HolderDevice)),
            ("holder", self.holder, get_args(HolderPlace)),
            ("wire_dtype", self.wire_dtype, get_args(WireDtype)),
            ("parameter_wire_dtype", self.parameter_wire_dtype, get_args(WireDtype)),
            ("overlap", self.overlap, (False, True)),
            ("reject_nonfinite", self.reject_nonfinite, (False, True)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")
        self._check_threads()
        if self.transport == "nccl" and self.holder_device == "cpu":
            raise ValueError(
                'transport="nccl" moves data between GPUs, so the holder is on rank 0\'s: leave holder_device="cpu" '
                'out, or take transport="auto".'
            )
        if self.holder == "process":
            if self.transport == "nccl" or self.holder_device == "cuda":
                raise ValueError(
                    'holder="process" keeps the holder on rank 0\'s host, and transport="nccl" and '
                    'holder_device="cuda" put it on its GPU: leave one of them out.'
                )
            if not hasattr(os, "memfd_create"):
                raise ValueError('holder="process" needs Linux (memfd_create); take holder="thread".')
        self._check_shards()
        limit: object = self.max_rejected_in_a_row
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_rejected_in_a_row must be an int of at least 1, not {limit!r}.")
        if not _is_above(0.0, self.worker_timeout_s):
            raise ValueError(f"worker_timeout must be a positive number of seconds, not {self.worker_timeout_s!r}.")
        if self.step_timeout_s is not None and not _is_above(0.0, self.step_timeout_s):
            raise ValueError(
                f"step_timeout must be a positive number of seconds, or None for no limit, not {self.step_timeout_s!r}."
            )
        if self.max_slowdown is not None and not _is_above(1.0, self.max_slowdown):
            raise ValueError(f"max_slowdown must be a number above 1, or None for no limit, not {self.max_slowdown!r}.")

    def _check_threads(self) -> None:
        threads: object = self.holder_threads
        if threads == "auto":
            return
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f'holder_threads must be an int of at least 1 or "auto", not {threads!r}.')
        if threads > 1 and (self.transport == "nccl" or self.holder_device == "cuda"):
            raise ValueError(
                f"holder_threads={threads} is for a holder on rank 0's host, and "
                'transport="nccl" and holder_device="cuda" put it on its GPU: leave one of them out.'
            )

    def _check_shards(self) -> None:
        shards: object = self.holder_shards
        if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
            raise ValueError(f"holder_shards must be an int of at least 1, not {shards!r}.")
        if shards == 1:
            return
        what = f"holder_shards={shards}"
        if self.holder_threads not in ("auto", 1):
            raise ValueError(
                f"{what} has a process with one thread for each shard, and holder_threads={self.holder_threads} "
                "is for a holder in one piece: leave one of them out."
            )
        if self.holder == "process":
            raise ValueError(
                f"{what} has a process for each shard but the first, which gives every gradient its place, and "
                'holder="process" has one for the whole holder: leave one of them out.'
            )
        if self.transport == "nccl" or self.holder_device == "cuda":
            other = 'holder_device="cuda"' if self.transport != "nccl" else 'transport="nccl"'
            raise ValueError(
                f"{what} keeps all shards in the memory of hosts, and {other} goes another way: leave one of them out."
            )
        if not hasattr(os, "memfd_create"):
            raise ValueError(f"{what} needs Linux (memfd_create); leave it out.")

    def shards(self, world_size: int) -> int:
        """In how many parts the holder is; one rank has it as a whole."""
        return self.holder_shards if world_size > 1 else 1

    def spreads(self, world_size: int, num_nodes: int) -> bool:
        """Whether the holder's shards are reached over the network: they are on several hosts, or TCP is asked for."""
        return self.shards(world_size) > 1 and (num_nodes > 1 or self.transport == "tcp")

    def slots(self, world_size: int) -> int:
        """How many exchanges a rank has under way at once."""
        return 2 if self.overlap and world_size > 1 else 1

    @property
    def watches_steps(self) -> bool:
        """Whether it is watched how long each rank takes for a step."""
        return self.step_timeout_s is not None or self.max_slowdown is not None


def _is_above(limit: float, value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and limit < value < math.inf
