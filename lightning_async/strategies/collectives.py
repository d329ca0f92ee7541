"""Lightning's collectives: real in the synchronous phase, local in the asynchronous one."""

from __future__ import annotations

import itertools
import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_async.loops.collective_guard import asynchronous_call_error
from lightning_async.loops.phase import Phase
from lightning_async.loops.tensor_sync import set_meeting
from lightning_async.runtime.losses import Losses
from lightning_async.runtime.meeting import Meeting
from lightning_async.runtime.process_groups import (
    breakable,
    exchange_group,
    forming_timeout,
    open_store,
    reform_default_group,
    reformed_place,
)

__all__ = ["PhasedCollectives"]

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_all = all

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
        # Where the run goes on without ranks that it loses: where the others meet, and who is in the process group.
        self.meeting: Meeting | None = None
        self._members: tuple[int, ...] | None = None
        self._group_generation = self._members_seen = 0
        # What that was formed by, on rank 0; as long as the group lives.
        self._store: dist.TCPStore | None = None
        # Whether this rank is about to join a run that is under way, and has nobody to meet yet.
        self.joins = False
        self._worker_rank: int | None = None
        self._before: tuple[int, int] | None = None
        self._losses: Losses
        super().__init__(**arguments)
        self.phase = Phase()

    @property
    @abstractmethod
    def strategy_name(self) -> str:
        """What a user calls the strategy, for messages."""

    # --- ranks that are lost, where the run goes on without them ------------------------------------------------------

    @property
    @override
    def world_size(self) -> int:
        """Number of ranks: those in the process group."""
        return self.nominal_world_size if self._members is None else len(self._members)

    @property
    @override
    def global_rank(self) -> int:
        """This rank's place among them."""
        return self.worker_rank if self._members is None else self._members.index(self.worker_rank)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Lightning takes the ranks that were started.
        # One that joins has its share of an evaluation once it has met the others.
        ranks = max(self.world_size, self.global_rank + 1) if self.joins else self.world_size
        return {"num_replicas": ranks, "rank": self.global_rank}

    @property
    def nominal_world_size(self) -> int:
        """The number of ranks that the run was started with, N: clock, epochs and bounds go by it."""
        return super().world_size if self._before is None else self._before[1]

    @property
    def worker_rank(self) -> int:
        """This rank's number in the exchange of gradients: what it was started with, whoever is lost."""
        if self._worker_rank is not None:
            return self._worker_rank
        return super().global_rank if self._before is None else self._before[0]

    @override
    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        # Where an earlier run of this script has lost ranks, the others are all there is.
        self._before, self._members, self._worker_rank = reformed_place(), None, None

    def meet_by(self, meeting: Meeting | None, losses: Losses | None = None) -> None:
        """Runs the strategy's own collectives by way of rank 0 from here on, past torch's process groups.

        Args:
            meeting: this rank's side; None for the process groups.
            losses: the ranks that the run has gone on without, where it may.
        """
        self.meeting, self._losses = meeting, losses or Losses()
        # One that has joined is in no group yet.
        self._members, self._group_generation, self._members_seen = None, -1 if self.joins else 0, 0
        self.joins = False
        set_meeting(meeting)

    @property
    def ranks_present(self) -> Sequence[int]:
        """The ranks that took part in the last meeting, by the numbers that they have in the exchange."""
        return range(self.world_size) if self.meeting is None else self.meeting.ranks

    @property
    def outlives_ranks(self) -> bool:
        """Whether the run goes on without ranks that it loses."""
        return self.meeting is not None

    def take_changed_members(self) -> bool:
        """Whether other ranks are in the process group than when this was last asked."""
        seen, self._members_seen = self._members_seen, self._group_generation
        return seen != self._members_seen

    def follow_roster(self) -> None:
        """Gives the ranks in the run a process group of their own, if the present one has others; a collective call."""
        meeting = self.meeting
        if meeting is None or meeting.generation == self._group_generation:
            return
        for attempt in itertools.count():
            # Before the meeting that settles who is in it: who is lost from here on may be one of them.
            self._losses.begin_group()
            own = open_store(meeting.host) if meeting.is_host else None
            port = meeting.gather(0 if own is None else own.port, "the port of a store")[0]
            generation, members = meeting.generation, meeting.ranks
            self._losses.settle_group(members)
            done = self._reform(meeting.host, port, members, forming_timeout(attempt))
            self._store = own
            if all(meeting.gather(done, "a process group")) and meeting.generation == generation:
                break
        self._group_generation, self._members = generation, members

    def _reform(self, host: str, port: int, members: tuple[int, ...], patience: timedelta) -> bool:
        place, size = members.index(self.worker_rank), len(members)
        try:
            with breakable(self._losses.is_group_outdated):
                # Rank 0, too, by a connection that was opened for it: one of before would not be broken.
                store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
                backend = self._get_process_group_backend()
                reform_default_group(store, place, size, backend, self._timeout, patience)
        except RuntimeError as error:
            # One of them was lost meanwhile; else the next attempt says so again.
            log.debug("no process group of ranks %s: %s", members, error)
            return False
        return True

    def repeat_if_lost(self, body: Callable[[], None], restore: Callable[[], None]) -> None:
        """Runs a part of the synchronous phase, and again if a rank was lost in it; a collective call.

        Args:
            body: the part.
            restore: called before it is repeated.
        """
        meeting = self.meeting
        if meeting is None or meeting.in_section or self.phase.is_asynchronous:
            body()
            return

        def attempt() -> None:
            self.follow_roster()
            body()

        meeting.repeat_until_whole(attempt, restore, self._losses.explain)

    # --- the collectives ----------------------------------------------------------------------------------------------

    def gather_objects(self, mine: _T) -> list[_T]:
        """Every rank's object, in the order of ranks; a collective call of the strategy's own."""
        if self.meeting is not None:
            return self.meeting.gather(mine, "gather_objects")
        if self.world_size == 1 or self.joins:
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
        if self._is_local("barrier"):
            return
        if self.meeting is not None:
            self.meeting.gather(None, self._named("barrier"))
            return
        if not _is_initialized():
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
        if self._is_local("broadcast"):
            return obj
        if self.meeting is not None:
            mine = obj if self.global_rank == src else None
            gathered: list[Any] = self.meeting.gather(mine, self._named("broadcast"))
            from_there: _T = gathered[src]
            return from_there
        if not _is_initialized():
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
            if self.meeting is not None and group is None and isinstance(tensor, Tensor):
                return self._reduce_by_meeting(self.meeting, tensor, reduce_op)
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
        if self.meeting is not None:
            decisions = map(bool, self.meeting.gather(decision, self._named("reduce_boolean_decision")))
            return _all(decisions) if all else any(decisions)
        return super().reduce_boolean_decision(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Every rank's tensor; only user code asks for it.

        Raises:
            MisconfigurationException: in the asynchronous phase: a result without the other ranks would be a lie.
        """
        if self.phase.is_asynchronous and self.world_size > 1:
            raise asynchronous_call_error("all_gather")
        if self.meeting is not None and group is None and not sync_grads:
            of_ranks = self.meeting.gather(tensor.detach().cpu(), self._named("all_gather"))
            return torch.stack([each.to(tensor.device) for each in of_ranks])
        return super().all_gather(tensor, group, sync_grads)

    def _reduce_by_meeting(self, meeting: Meeting, tensor: Tensor, reduce_op: Any) -> Tensor:
        ranks = torch.stack(meeting.gather(tensor.detach().cpu(), self._named("reduce")))
        name = str(reduce_op).rpartition(".")[2].lower()
        reductions: dict[str, Callable[[], Tensor]] = {
            "sum": lambda: ranks.sum(0),
            "mean": lambda: ranks.mean(0),
            "avg": lambda: ranks.mean(0),
            "max": lambda: ranks.amax(0),
            "min": lambda: ranks.amin(0),
            "product": lambda: ranks.prod(0),
        }
        if name not in reductions:
            raise MisconfigurationException(
                f'{self.strategy_name} with on_worker_failure="continue" reduces by {", ".join(reductions)}, not by '
                f"{reduce_op!r}."
            )
        # As torch's all-reduce does, in place.
        return tensor.copy_(reductions[name]())

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

    def _named(self, name: str) -> str:
        """What the ranks meet for: a call of user code is not taken for one of Lightning's."""
        return name if self._called_by_library() else f"{name}, called by user code"

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
        "_named",
        "_reduce_by_meeting",
        "all_gather",
        "barrier",
        "broadcast",
        "reduce",
        "reduce_boolean_decision",
    )
)
