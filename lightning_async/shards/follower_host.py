"""The followers of one process: one, and while another takes its place both."""

from __future__ import annotations

import torch

from lightning_async.runtime.failure import FailureLatch
from lightning_async.shards.follower import FindMemory, Follower
from lightning_async.shards.operations import Attach, Operation, ShardSpec

__all__ = ["FollowerHost"]


class FollowerHost:
    """Has a process's followers do what they are told.

    Args:
        latch: the latch of the process.
    """

    def __init__(self, latch: FailureLatch) -> None:
        self._latch = latch
        self._followers: dict[int, Follower] = {}

    def serve(self, number: int, spec: ShardSpec, find_memory: FindMemory | None = None) -> None:
        """Makes a follower.

        Args:
            number: its number; each is larger than the one before.
            spec: what it holds.
            find_memory: gives the memory of a worker's slot; by default that which all shards of this host map.
        """
        torch.set_default_dtype(spec.default_dtype)
        self._followers[number] = Follower(spec, self._latch, find_memory)

    def do(self, number: int, place: int, operation: Operation) -> str | None:
        """Has a follower do what it is told; see `Follower.do`."""
        if isinstance(operation, Attach):
            for former in [key for key in self._followers if key < number]:
                self._followers.pop(former).close()
        return self._followers[number].do(place, operation)
