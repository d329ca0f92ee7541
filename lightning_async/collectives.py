"""Lightning's collectives: real in the synchronous phase, local in the asynchronous one. Below `strategy.py`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_async.phases import Phase

__all__ = ["PhasedCollectives"]

_T = TypeVar("_T")


class PhasedCollectives(DDPStrategy):
    """DDP's collectives, which run only while all ranks run them.

    While ranks train asynchronously no two of them are at the same batch: a collective would make them wait for each
    other, or pair calls that do not belong together.
    """

    _warned_of_local_reduce = False

    @property
    @abstractmethod
    def strategy_name(self) -> str:
        """What a user calls the strategy, for messages."""

    def gather_objects(self, mine: _T) -> list[_T]:
        """Every rank's object, in the order of ranks; a collective call."""
        if self.world_size == 1:
            return [mine]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, mine)
        return gathered

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks in the synchronous phase; nothing in the asynchronous one."""
        if not Phase.asynchronous:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """Rank ``src``'s object in the synchronous phase; this rank's own in the asynchronous one."""
        return obj if Phase.asynchronous else super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduces over the ranks in the synchronous phase; this rank's own value, with one warning, otherwise."""
        if not Phase.asynchronous:
            if isinstance(tensor, Tensor) and not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
                # Lightning truncates the mean of integers: of the sample counts that weigh an epoch's metric, which
                # under DDP are the same on all ranks.
                tensor = tensor.float()
            return super().reduce(tensor, group, reduce_op)
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
        """The ranks' common decision in the synchronous phase; this rank's own in the asynchronous one."""
        return decision if Phase.asynchronous else super().reduce_boolean_decision(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Every rank's tensor.

        Raises:
            MisconfigurationException: in the asynchronous phase: a result without the other ranks would be a lie.
        """
        if Phase.asynchronous:
            raise MisconfigurationException(
                "all_gather was called while the ranks train asynchronously: no two of them are at the same batch. "
                'Call it in validation or at the end of the epoch, or use strategy="ddp".'
            )
        return super().all_gather(tensor, group, sync_grads)
