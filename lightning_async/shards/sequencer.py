"""The sequencing holder: the `Holder` of a run with shards, in rank 0's process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async.exchange.shared_payload import SharedPayload
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import OnStale
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.holder import Holder
from lightning_async.holder.layout import exchanged
from lightning_async.holder.types import HalfUpdatedError, Push, Snapshot, Update
from lightning_async.policies.base import StalenessPolicy
from lightning_async.runtime.failure import FailureLatch
from lightning_async.shards import operations as tell
from lightning_async.shards.follower import layout_of_pieces
from lightning_async.shards.followers import Followers
from lightning_async.shards.plan import ShardPlan
from lightning_async.shards.template import optimizer_of_pieces
from lightning_async.transport.base import Buffers, Channel
from lightning_async.transport.message import Message

__all__ = ["SequencingHolder"]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A worker's slot: which it is, and this shard's part of its memory."""

    worker: int
    slot: int
    gradient: Tensor
    views: list[Tensor]
    parameters: Tensor


class SequencingHolder(Holder):
    """Holds the first shard, decides for all, and has the followers do the same in the same order.

    To its callers it is a holder of the whole vector. Each decision is made here, under the lock, and told to the
    followers before the lock is given back; so the order of what they are told is the order of the decisions, and what
    all shards hold at one place in it is one version. Workers' memory is attached before they are served; a gradient
    lies there as a whole before it is announced, so no shard ever waits for a part of it.

    Args:
        plan: who holds what.
        followers: the other shards, which hold the same version of their parts.
        parameters: initial values of the whole vector.
        optimizer: the optimizer to stand in for.
        barrier: see `Holder`.
        latch: see `Holder`.
        observer: see `Holder`; of a gradient it sees the first shard's part.
        state: what the optimizer keeps to begin with; None for what it has.
        policy: see `Holder`.
        momentum_rule: see `Holder`.

    Attributes:
        plan: who holds what.
    """

    def __init__(
        self,
        plan: ShardPlan,
        followers: Followers,
        parameters: Tensor,
        optimizer: torch.optim.Optimizer,
        barrier: StalenessBarrier,
        latch: FailureLatch,
        observer: Callable[[Update], None] = lambda update: None,
        state: StateByPlace | None = None,
        policy: StalenessPolicy | None = None,
        momentum_rule: Callable[[float], float] | None = None,
    ) -> None:
        self.plan = plan
        self._followers = followers
        # Whether this shard may have changed, and the others were not told yet.
        self._is_ahead = False
        self._pieces = plan.pieces(0)
        own = optimizer_of_pieces(optimizer, plan, 0)
        self._own_layout = layout_of_pieces(own, parameters.dtype)
        self._group_sizes = [sum(map(exchanged, group["params"])) for group in optimizer.param_groups]
        # By where a slot's parameters lie, which is how its reads name it, and by worker and slot, as pushes do.
        self._slots: dict[int, _Slot] = {}
        self._slot_of: dict[tuple[int, int], _Slot] = {}
        # Where in the order the last copy for a slot is.
        self._copied: dict[int, int] = {}
        super().__init__(
            self._own_layout,
            parameters[plan.part(0)],
            [own],
            barrier,
            latch,
            observer,
            policy=policy,
            momentum_rule=momentum_rule,
        )
        if state is not None:
            super().load_states([plan.cut_state(state, 0)])

    def attach(self, worker: int, slot: int, memory: str, buffers: Buffers) -> None:
        """Gives all shards a slot's memory; returns when they have it.

        Args:
            worker: the slot's worker.
            slot: which of its slots.
            memory: its address, for other processes.
            buffers: the same memory here.
        """
        part = self.plan.part(0)
        gradient = buffers.gradient[part]
        mine = _Slot(worker, slot, gradient, self._own_layout.views(gradient, 0), buffers.parameters[part])
        with self._lock:
            self._slots = {at: one for at, one in self._slots.items() if (one.worker, one.slot) != (worker, slot)}
            self._slots[buffers.parameters.data_ptr()] = self._slot_of[worker, slot] = mine
            place = self._followers.tell(tell.Attach(worker, slot, memory))
        self._followers.wait(place)

    def send_when_copied(self, out: Tensor, channel: Channel, message: Message) -> None:
        """Sends the message that announces a slot's parameters, once all shards have copied theirs; returns at once.

        Args:
            out: where they lie.
            channel: the slot's.
            message: what announces them.
        """
        self._followers.send_when_done(self._copied[out.data_ptr()], channel, message)

    def wait_until_copied(self, out: Tensor) -> None:
        """Returns when all shards have copied their parts to ``out``."""
        self._followers.wait(self._copied[out.data_ptr()])

    @override
    def try_pull(self, worker: int, out: Tensor, slot: int = 0) -> int | None:
        with self._lock:
            version = super().try_pull(worker, self._slots[out.data_ptr()].parameters, slot)
            if version is not None:
                self._copy_to(out, version, reads=True)
            return version

    @override
    def try_push(
        self, push: Push, parked_s: float = 0.0, reads_next: Callable[[], bool] = lambda: False
    ) -> Update | None:
        with self._lock:
            self._check_told()
            gradients, present = self._own_gradients(push)
            own = push._replace(gradients=gradients, flat=None if push.flat is None else push.flat[self.plan.part(0)])
            with self._ahead():
                update = super().try_push(own, parked_s, reads_next)
                if update is not None:
                    what = (push.worker, push.slot, push.version_read, push.groups, push.samples)
                    self._followers.tell(tell.ApplyPush(*what, present, push.finite, update.version, update.applied))
            return update

    @property
    @override
    def joins_pushes(self) -> bool:
        # Each is told to the followers by itself.
        return False

    @override
    def leave(self, worker: int, slot: int = 0) -> None:
        with self._lock:
            super().leave(worker, slot)
            self._followers.tell(tell.Depart(worker, slot))

    @override
    def read(self, out: Tensor) -> int:
        with self._lock:
            version = super().read(self._slots[out.data_ptr()].parameters)
            self._copy_to(out, version, reads=False)
            return version

    @override
    def adjust(
        self,
        max_staleness: int | None,
        on_stale: OnStale,
        gradients_per_update: int,
        policy: StalenessPolicy,
        momentum_rule: Callable[[float], float] | None,
    ) -> None:
        with self._lock, self._ahead():
            super().adjust(max_staleness, on_stale, gradients_per_update, policy, momentum_rule)
            self._followers.tell(tell.Adjust(max_staleness, on_stale, gradients_per_update, policy))

    @override
    def complete_version(self) -> bool:
        with self._lock, self._ahead():
            completed = super().complete_version()
            if completed:
                self._followers.tell(tell.Complete())
            return completed

    @override
    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        (owned,) = parameters
        with self._ahead():
            super().load_parameters([self._cut(owned, 0)])
            self._load(tell.LoadParameters, lambda shard: self._cut(owned, shard))

    @override
    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        for state in states:
            if state is not None:
                self._load_state(state)

    def _load_state(self, state: StateByPlace) -> None:
        with self._ahead():
            super().load_states([self.plan.cut_state(state, 0)])
            self._load(tell.LoadStates, lambda shard: self.plan.cut_state(state, shard, copies=True))

    @override
    def optimizer_state(self, index: int) -> StateByPlace:
        with self._lock:
            mine = super().optimizer_state(index)
            place = self._followers.tell(tell.ReadState(), asks=True)
        return self.plan.join_state([mine, *self._take(place)])

    @override
    def take_adapted(self) -> list[list[dict[str, Any]]]:
        with self._lock:
            self._followers.tell(tell.TakeAdapted())
            return super().take_adapted()

    @override
    def snapshot(self, applied: Callable[[], Sequence[tuple[int, int]]] = tuple) -> Snapshot:
        with self._lock:
            mine = super().snapshot(applied)
            place = self._followers.tell(tell.TakeSnapshot(), asks=True)
        return self._join([mine, *self._take(place)])

    @override
    def restore(
        self,
        version: int,
        optimizer_states: Sequence[Mapping[str, Any]],
        gathered: Gathered | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> bool:
        whole = self._by_place(optimizer_states[0])
        mine = self._cut_dict(whole, 0)

        def part(shard: int) -> Any:
            return self._cut_dict(whole, shard), self._cut_gathered(gathered, shard), policy

        with self._ahead():
            converted = super().restore(version, [mine], self._cut_gathered(gathered, 0), policy)
            self._load(lambda payload: tell.Restore(version, payload), part)
        return converted

    @contextmanager
    def _ahead(self) -> Iterator[None]:
        """Around what changes this shard first, and then the others."""
        self._is_ahead = True
        try:
            yield
        except Exception:
            self._is_ahead = False
            raise
        # What ends the process from a signal's handler leaves it as it is.
        self._is_ahead = False

    @override
    def _check_whole(self) -> None:
        super()._check_whole()
        self._check_told()

    def _check_told(self) -> None:
        if self._is_ahead:
            raise HalfUpdatedError(
                "the holder's first shard is one update ahead of the others: a signal's handler, or an observer, came "
                "in the middle of an update. Let the handler set trainer.should_stop = True in place of an exit"
            )

    def _copy_to(self, out: Tensor, version: int, reads: bool) -> None:
        slot = self._slots[out.data_ptr()]
        self._copied[out.data_ptr()] = self._followers.tell(tell.CopyOut(slot.worker, slot.slot, version, reads))

    def _own_gradients(self, push: Push) -> tuple[list[Tensor | None], tuple[bool, ...] | None]:
        """This shard's pieces of a gradient, and which parameters have one; None if all have."""
        slot = self._slot_of[push.worker, push.slot]
        if not any(gradient is None for gradient in push.gradients):
            return [*slot.views], None
        present = tuple(gradient is not None for gradient in push.gradients)
        views = zip(self._pieces, slot.views, strict=True)
        return [view if present[piece.parameter] else None for piece, view in views], present

    def _load(self, operation: Callable[[str], tell.Operation], part: Callable[[int], Any]) -> None:
        """Gives each follower its part, and returns when they have taken it."""
        with ExitStack() as payloads:
            parts = [payloads.enter_context(SharedPayload(part(shard))) for shard in range(1, self.plan.count)]
            with self._lock:
                place = self._followers.tell(*(operation(one.address) for one in parts))
            self._followers.wait(place)

    def _take(self, place: int) -> list[Any]:
        answers = self._followers.answers(place)
        with self._lock:
            self._followers.tell(tell.Forget(place))
        return answers

    def _cut(self, tensors: Sequence[Tensor | None], shard: int) -> list[Any]:
        return self.plan.cut_tensors(tensors, shard, copies=shard > 0)

    def _cut_dict(self, state: Mapping[str, Any], shard: int) -> dict[str, Any]:
        """A shard's part of a state dict in torch's format."""
        places = [piece.parameter for piece in self.plan.pieces(shard)]
        mine = {place: index for index, place in enumerate(places)}
        groups = [
            {**group, "params": [mine[place] for place in group["params"] if place in mine]}
            for group in state["param_groups"]
        ]
        return {**state, "state": self.plan.cut_state(state["state"], shard, copies=shard > 0), "param_groups": groups}

    def _by_place(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict in torch's format, with each parameter's place for its number.

        Raises:
            ValueError: if it is of other param groups, in torch's words.
        """
        groups = state["param_groups"]
        if len(groups) != len(self._group_sizes):
            raise ValueError("loaded state dict has a different number of parameter groups")
        if [len(group["params"]) for group in groups] != self._group_sizes:
            raise ValueError("loaded state dict contains a parameter group that doesn't match the size of optimizer's")
        numbers = [number for group in groups for number in group["params"]]
        by_place = {place: state["state"][number] for place, number in enumerate(numbers) if number in state["state"]}
        return {**state, "state": by_place, "param_groups": self._numbered(groups)}

    def _numbered(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        ends = itertools.accumulate(self._group_sizes, initial=0)
        places = itertools.pairwise(ends)
        return [{**group, "params": [*range(*place)]} for group, place in zip(groups, places, strict=True)]

    def _cut_gathered(self, gathered: Gathered | None, shard: int) -> Gathered | None:
        if gathered is None:
            return None
        late = None if gathered.late is None else self._cut(gathered.late, shard)
        return dataclasses.replace(gathered, gradients=self._cut(gathered.gradients, shard), late=late)

    def _join(self, parts: Sequence[Snapshot]) -> Snapshot:
        plan, first = self.plan, parts[0]
        state = first.optimizer_states[0]
        joined = plan.join_state([part.optimizer_states[0]["state"] for part in parts])
        groups = self._numbered(state["param_groups"])
        gathered = None
        if first.gathered is not None:
            everyone = [part.gathered for part in parts]
            gradients = plan.join_tensors([one.gradients for one in everyone if one is not None])
            lates = [one.late for one in everyone if one is not None and one.late is not None]
            late = plan.join_tensors(lates) if lates else None
            gathered = dataclasses.replace(first.gathered, gradients=gradients, late=late)
        return dataclasses.replace(
            first,
            parameters=torch.cat([part.parameters for part in parts]),
            optimizer_states=[{**state, "state": joined, "param_groups": groups}],
            gathered=gathered,
        )
