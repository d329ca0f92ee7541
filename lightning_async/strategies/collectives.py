"""Lightning's collectives: real in the synchronous phase, local in the asynchronous one."""

from __future__ import annotations

import sys
from abc import abstractmethod
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_async.loops.collective_guard import asynchronous_call_error
from lightning_async.loops.phase import Phase
from lightning_async.runtime.process_groups import exchange_group

__all__ = ["PhasedCollectives"]

_T = TypeVar("_T")

# Packages whose calls of the strategy's collectives in a batch are known, and right as local ones.
_LIBRARIES = ("lightning", "lightning_async")


class PhasedCollectives(DDPStrategy):
    """DDP's collectives, which run only while all ranks run them.

    While ranks train asynchronously no two of them are at the same batch: a collective would make them wait for each
    other, or pair calls that do not belong together. What Lightning calls in a batch is local then, and what user code
    calls is an error.

    In the synchronous phase Lightning's calls and the strategy's own run in a group of their own, so that a call of
    user code that not every rank makes is never taken for one of them; those of user code run in the default group.
    """

    _warned_of_local_reduce = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.phase = Phase()

    @property
    @abstractmethod
    def strategy_name(self) -> str:
        """What a user calls the strategy, for messages."""

    def gather_objects(self, mine: _T) -> list[_T]:
        """Every rank's object, in the order of ranks; a collective call of the strategy's own."""
        if self.world_size == 1:
            return [mine]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, mine, group=exchange_group())
        return gathered

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks in the synchronous phase; nothing in the asynchronous one.

        Raises:
            MisconfigurationException: if user code calls it in the asynchronous phase.
        """
        if self._is_local("barrier") or not _is_initialized():
            return
        group = self._group()
        on_gpu = dist.get_backend(group) == "nccl"
        dist.barrier(group=group, device_ids=self.determine_ddp_device_ids() if on_gpu else None)

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """Rank ``src``'s object in the synchronous phase; this rank's own in the asynchronous one.

        Raises:
            MisconfigurationException: if user code calls it in the asynchronous phase.
        """
        if self._is_local("broadcast") or not _is_initialized():
            return obj
        shared: list[Any] = [obj]
        dist.broadcast_object_list(shared, src, group=self._group())
        received: _T = shared[0]
        return received

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduces over the ranks in the synchronous phase; this rank's own value, with one warning, otherwise.

        Raises:
            MisconfigurationException: if user code calls it in the asynchronous phase.
        """
        if not self._is_local("reduce"):
            if isinstance(tensor, Tensor) and not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
                # Lightning truncates the mean of integers: of the sample counts that weigh an epoch's metric, which
                # under DDP are the same on all ranks.
                tensor = tensor.float()
            return super().reduce(tensor, self._group() if group is None else group, reduce_op)
        if self.world_size > 1 and not self._warned_of_local_reduce:
            self._warned_of_local_reduce = True
            rank_zero_warn(
                f"{self.strategy_name} does not reduce over the ranks while they train: values logged with "
                "on_step=True and sync_dist=True are rank 0's own. Values logged on_epoch are reduced at the end of "
                "the epoch."
            )
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The ranks' common decision in the synchronous phase; this rank's own in the asynchronous one.

        Raises:
            MisconfigurationException: if user code calls it in the asynchronous phase.
        """
        if self._is_local("reduce_boolean_decision"):
            return decision
        return super().reduce_boolean_decision(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Every rank's tensor; only user code asks for it.

        Raises:
            MisconfigurationException: in the asynchronous phase: a result without the other ranks would be a lie.
        """
        if self.phase.is_asynchronous and self.world_size > 1:
            raise asynchronous_call_error("all_gather")
        return super().all_gather(tensor, group, sync_grads)

    def _is_local(self, name: str) -> bool:
        """Whether a collective is to be local now: Lightning's own are, in the asynchronous phase.

        Raises:
            MisconfigurationException: if user code calls it there.
        """
        if not self.phase.is_asynchronous:
            return False
        if self.world_size > 1 and not self._called_by_library():
            raise asynchronous_call_error(f"trainer.strategy.{name}")
        return True

    def _group(self) -> dist.ProcessGroup | None:
        return exchange_group() if self._called_by_library() else None

    def _called_by_library(self) -> bool:
        """Whether the call of a collective stands in Lightning or here, and not in user code.

        What counts is where the call stands, not whose object makes it: `ModelCheckpoint`'s own calls are Lightning's
        in a user's subclass too, and those that the subclass adds are the user's.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and self._runs(frame):
            # A strategy's collectives call one another, also from a user's subclass that passes them on.
            frame = frame.f_back
        module = "" if frame is None else str(frame.f_globals.get("__name__", ""))
        return module.partition(".")[0] in _LIBRARIES

    def _runs(self, frame: FrameType) -> bool:
        return frame.f_code.co_name in _COLLECTIVES and frame.f_locals.get("self") is self


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


# The strategy's methods that are collectives, and what they ask on the way.
_COLLECTIVES = frozenset(
    (
        "_called_by_library",
        "_group",
        "_is_local",
        "all_gather",
        "barrier",
        "broadcast",
        "reduce",
        "reduce_boolean_decision",
    )
)
