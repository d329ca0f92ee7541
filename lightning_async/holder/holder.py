"""The holder: master parameters, optimizer state and version, in rank 0.

Does no I/O and imports no Lightning.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async.holder import blocks
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import Decision, OnStale
from lightning_async.holder.changes import Changes
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.held_state import StateByPlace
from lightning_async.holder.intake import GradientIntake
from lightning_async.holder.layout import FlatLayout, exchanged
from lightning_async.holder.reserve import Reserve
from lightning_async.holder.tally import STEPS, add_counts
from lightning_async.holder.team import Team
from lightning_async.holder.types import Push, Snapshot, Update, WaitingPush
from lightning_async.holder.update import HeldOptimizer
from lightning_async.holder.wholeness import Wholeness
from lightning_async.policies.base import StalenessPolicy
from lightning_async.runtime.failure import FailureLatch

__all__ = ["Holder"]


class Holder:
    """Master parameters, optimizer state and version; a monitor that does no I/O and never waits.

    Every public method takes the lock, leaves the state consistent, and returns or fills copies. A push or a pull
    that the barrier holds back is told so; its caller tries again after the next change (`wait_for_change`,
    `subscribe`).

    Args:
        layout: where each parameter lies.
        parameters: initial values, a flat buffer of ``layout``; copied.
        optimizers: the optimizers to stand in for, in the layout's order.
        barrier: who may proceed, and how many gradients make an update; owned by the holder from here on.
        latch: the run's failure latch.
        observer: called under the lock with every applied, dropped or rejected push; must be quick.
        states: for each optimizer the state to begin with; None for what its template has.
        policy: what is done with a gradient because of its age, bound to the run; owned by the holder from here on.
        momentum_rule: what steps use in place of the user's momentum; None leaves it.
        threads: how many go over the memory of a large model on the host at once, the caller's among them.

    Raises:
        ValueError: if several gradients are to make an update, and there are several optimizers.
    """

    def __init__(
        self,
        layout: FlatLayout,
        parameters: Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        barrier: StalenessBarrier,
        latch: FailureLatch,
        observer: Callable[[Update], None] = lambda update: None,
        states: Sequence[StateByPlace | None] = (),
        policy: StalenessPolicy | None = None,
        momentum_rule: Callable[[float], float] | None = None,
        threads: int = 1,
    ) -> None:
        self._layout = layout
        self._team = Team(threads if parameters.is_cpu and layout.numel >= blocks.LARGE else 1)
        self._flat = parameters.detach().clone()
        self._barrier = barrier
        self._latch = latch
        self._observer = observer
        self._lock = threading.RLock()
        self._changes = Changes(self._lock, latch)
        # Entered between the first and the last that a push changes.
        self._whole = Wholeness()
        self._counts: list[int] = []
        self._optimizers: list[HeldOptimizer] = []
        for index, template in enumerate(optimizers):
            views = iter(layout.views(self._flat, index))
            groups = [
                [torch.nn.Parameter(next(views)) for parameter in group["params"] if exchanged(parameter)]
                for group in template.param_groups
            ]
            self._optimizers.append(HeldOptimizer(template, groups, momentum_rule, self._team))
        self._intake = self._make_intake(policy or StalenessPolicy())
        self.load_states(states)

    @property
    def version(self) -> int:
        """Number of updates applied so far, k."""
        with self._lock:
            return self._barrier.version

    @property
    def changes(self) -> int:
        """How often something has changed that a held-back caller may have waited for."""
        return self._changes.number

    def wait_for_change(self, seen: int) -> None:
        """Waits until `changes` is no longer ``seen``, or the run fails."""
        self._changes.wait(seen)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` after every change, in the thread that made it and under the lock; must be quick."""
        self._changes.subscribe(listener)

    def try_pull(self, worker: int, out: Tensor, slot: int = 0) -> int | None:
        """Copies the parameters into ``out`` if the barrier lets ``worker`` read; returns their version, or None.

        A worker that is held back keeps its place in the queue of readers.

        Raises:
            ValueError: if the worker holds parameters already.
            WorkerFailedError: if the run has failed.
        """
        with self._lock:
            self._latch.check()
            reader = (worker, slot)
            self._barrier.ask(reader)
            if not self._barrier.may_read(reader):
                return None
            version = self._barrier.read(reader)
            self._intake.copy(out)
            # The next reader in the queue may go too: nobody else would tell it.
            self._changes.tell()
            return version

    def try_push(
        self, push: Push, parked_s: float = 0.0, reads_next: Callable[[], bool] = lambda: False
    ) -> Update | None:
        """Applies a gradient if the barrier lets it, or drops or rejects it; returns what became of it.

        A gradient that is not finite is rejected at once: none of the others waits for it, and it makes no version.

        Args:
            push: the gradient.
            parked_s: seconds that the barrier has held it back so far.
            reads_next: called under the lock once the gradient is applied, dropped or rejected; tells whether the
                worker pulls next. It then has its place in the queue of readers from here on, and none can overtake it
                on its way.

        Returns:
            What became of it; None if it must wait.

        Raises:
            ValueError: if the worker does not hold the version that it says it read.
            WorkerFailedError: if the run has failed.
            HalfUpdatedError: if an update was broken off; what is made of it by another one would look whole.
        """
        with self._lock:
            self._latch.check()
            self._whole.check()
            reader = (push.worker, push.slot)
            held = self._barrier.held(reader)
            if held != push.version_read:
                raise ValueError(
                    f"worker {push.worker} pushes a gradient of version {push.version_read} but holds {held}"
                )
            decision = self._barrier.decision(reader) if push.finite else Decision.DROP
            if decision is Decision.WAIT:
                return None
            applied = decision is Decision.APPLY
            began_ns = time.monotonic_ns()
            with self._whole:
                if not push.finite:
                    staleness = self._barrier.version - held
                    self._barrier.leave(reader)
                elif applied:
                    version = self._barrier.version
                    self._intake.take(push, version - held, version, self._barrier.filled)
                    staleness = self._barrier.apply(reader)
                else:
                    staleness = self._barrier.discard(reader)
                if push.counts:
                    counts = [*push.counts]
                    # A step whose gradient was not applied is none.
                    counts[STEPS] = max(0, counts[STEPS] - (not applied))
                    self._counts = add_counts(self._counts, counts)
            now_ns = time.monotonic_ns()
            took_ns, rejected = now_ns - began_ns, not push.finite
            update = Update(push, self._barrier.version, staleness, applied, parked_s, now_ns, took_ns, rejected)
            self._settle(update, reads_next)
            return update

    @property
    def joins_pushes(self) -> bool:
        """Whether pushes that wait are better given to `push_together`: of a large model, on the host."""
        return self._flat.is_cpu and self._intake.joins_pushes

    def push_together(self, waiting: Sequence[WaitingPush]) -> list[tuple[Update, int | None]]:
        """Applies gradients that wait and answers each, with the bits and versions of one after the other.

        That is `try_push` of each, followed by its `try_pull`, but memory is gone over once. It ends before the first
        push that is not simply applied: one that the barrier holds back or drops, say. Where it would be a single one
        there is nothing to gain. What is left is for `try_push`.

        Args:
            waiting: in their order, each slot of a worker once. What is in ``out`` is of no use where the worker does
                not read.

        Returns:
            Of each that was applied, from the first on: what became of it, and the version that was read; None if the
            worker does not pull next, or has to wait for that.

        Raises:
            WorkerFailedError: if the run has failed.
            HalfUpdatedError: as by `try_push`.
        """
        with self._lock:
            self._latch.check()
            self._whole.check()
            joined = self._in_a_row(waiting)
            if len(joined) < 2:
                return []
            began_ns = time.monotonic_ns()
            answers: list[tuple[Update, int | None]] = []
            # Until versions and parameters go together again.
            with self._whole:
                self._intake.take_together([(one.push, one.out) for one in joined])
                took_ns = (time.monotonic_ns() - began_ns) // len(joined)
                for place, (push, _, reads_next) in enumerate(joined, 1):
                    reader = (push.worker, push.slot)
                    staleness = self._barrier.apply(reader)
                    if push.counts:
                        self._counts = add_counts(self._counts, push.counts)
                    at_ns = began_ns + place * took_ns
                    update = Update(push, self._barrier.version, staleness, True, 0.0, at_ns, took_ns)
                    reads = self._settle(update, reads_next) and self._barrier.may_read(reader)
                    answers.append((update, self._barrier.read(reader) if reads else None))
            return answers

    def _in_a_row(self, waiting: Sequence[WaitingPush]) -> Sequence[WaitingPush]:
        """Those that are simply applied, from the first on."""
        fits = itertools.takewhile(
            lambda one: (
                self._intake.can_join(one.push)
                and self._barrier.held((one.push.worker, one.push.slot)) == one.push.version_read
            ),
            waiting,
        )
        return waiting[: self._barrier.in_a_row((one.push.worker, one.push.slot) for one in fits)]

    def _settle(self, update: Update, reads_next: Callable[[], bool]) -> bool:
        """Tells of what became of a push; returns whether its worker is in the queue of readers now."""
        self._observer(update)
        reads = reads_next()
        if reads:
            self._barrier.ask((update.push.worker, update.push.slot))
        self._changes.tell()
        return reads

    def adjust(
        self,
        max_staleness: int | None,
        on_stale: OnStale,
        gradients_per_update: int,
        policy: StalenessPolicy,
        momentum_rule: Callable[[float], float] | None,
    ) -> None:
        """Goes on by other rules, at the border of a version; nobody may be computing.

        Args:
            max_staleness: see `StalenessBarrier`.
            on_stale: see `StalenessBarrier`.
            gradients_per_update: see `StalenessBarrier`.
            policy: what is done with a gradient because of its age, bound to the run; it goes on from what the one
                before has learned, if it is of the same class.
            momentum_rule: what steps use in place of the user's momentum; None leaves it.

        Raises:
            ValueError: if the barrier refuses.
        """
        with self._lock:
            self._barrier.adjust(max_staleness, on_stale, gradients_per_update)
            learned = self._intake.policy_state()
            for optimizer in self._optimizers:
                optimizer.momentum_rule = momentum_rule
            self._intake = self._make_intake(policy)
            self._intake.load_policy_state(learned)
            self._changes.tell()

    def _make_intake(self, policy: StalenessPolicy) -> GradientIntake:
        # Where no gradient can be stale, nobody has anything to look ahead to.
        looks_ahead = self._barrier.max_staleness != 0
        needed = self._barrier.gradients_per_update
        return GradientIntake(self._layout, self._flat, self._optimizers, policy, needed, looks_ahead, self._team)

    def complete_version(self) -> bool:
        """Makes an update of the gradients that wait for more; nobody may be computing.

        Returns:
            Whether there were any.
        """
        with self._lock:
            if not self._barrier.filled:
                return False
            self._intake.complete()
            self._barrier.complete()
            self._changes.tell()
            return True

    def count(self, counts: Sequence[int]) -> None:
        """Adds what a worker has counted, apart from a push."""
        with self._lock:
            self._counts = add_counts(self._counts, counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """What all workers have counted."""
        return tuple(self._counts)

    @counts.setter
    def counts(self, counts: Sequence[int]) -> None:
        self._counts = [*counts]

    def load_parameters(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        """Takes over parameters that differ from its own; nobody may be computing.

        Args:
            parameters: for each optimizer its parameters. Where they are rounded (a module in bfloat16), the holder
                keeps its own values as long as they round to these.
        """
        with self._lock:
            for index, owned in enumerate(parameters):
                for view, parameter in zip(self._layout.views(self._flat, index), owned, strict=True):
                    own = view.to(device=parameter.device, dtype=parameter.dtype)
                    if not torch.equal(own, parameter.detach()):
                        view.copy_(parameter.detach())

    def load_states(self, states: Sequence[StateByPlace | None]) -> None:
        """Takes over optimizer states that differ from its own; nobody may be computing.

        Args:
            states: for each optimizer what it keeps for each parameter; None leaves it as it is.
        """
        with self._lock:
            for optimizer, state in zip(self._optimizers, states, strict=False):
                if state is not None:
                    optimizer.load_state(state)

    def optimizer_state(self, index: int) -> StateByPlace:
        """A copy of what one optimizer keeps, by the places of its parameters."""
        with self._lock:
            self._check_whole()
            state: StateByPlace = self._optimizers[index].state_dict()["state"]
            return state

    def take_adapted(self) -> list[list[dict[str, Any]]]:
        """For each optimizer and param group the values that steps have changed, for the workers to set in theirs."""
        with self._lock:
            return [optimizer.take_adapted() for optimizer in self._optimizers]

    def leave(self, worker: int, slot: int = 0) -> None:
        """Takes ``worker`` out of the barrier: it computes nothing more, or is dead."""
        with self._lock:
            self._barrier.leave((worker, slot))
            self._changes.tell()

    def expect(self, workers: Iterable[int]) -> None:
        """Puts workers into the queue of readers before they ask, so that none can be overtaken on its way here.

        One that computes nothing must `leave`, or those behind it wait for ever.
        """
        with self._lock:
            for worker in workers:
                self._barrier.ask((worker, 0))

    def read(self, out: Tensor) -> int:
        """Copies the parameters into ``out`` past the barrier, for the synchronous phase; returns their version."""
        with self._lock:
            self._copy(out)
            return self._barrier.version

    def snapshot(self, applied: Callable[[], Sequence[tuple[int, int]]] = tuple) -> Snapshot:
        """Parameters and optimizer states of one version.

        Args:
            applied: tells the tickets that are applied; called under the lock, as the observer is, so that the tickets
                are those of the same version.
        """
        # Memory is made ready first, so that no update waits for it.
        with self._lock:
            copied = [self._flat, *(each for optimizer in self._optimizers for each in optimizer.tensors())]
        reserve = Reserve(copied)
        with self._lock:
            self._check_whole()
            states = [optimizer.state_dict(reserve.copy) for optimizer in self._optimizers]
            adapted = [optimizer.adapted() for optimizer in self._optimizers]
            version, counts = self._barrier.version, tuple(self._counts)
            gathered, policy = self._intake.gathered(self._barrier.filled), self._intake.policy_state()
            return Snapshot(
                version, reserve.copy(self._flat), states, adapted, tuple(applied()), counts, gathered, policy
            )

    def restore(
        self,
        version: int,
        optimizer_states: Sequence[Mapping[str, Any]],
        gathered: Gathered | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> bool:
        """Loads optimizer states, in torch's format, and the version; nobody may be computing.

        Args:
            version: the version.
            optimizer_states: each optimizer's state dict.
            gathered: gradients that wait for more; where they are enough by now, they are an update.
            policy: what a staleness policy has learned; ignored if it is of another class.

        Returns:
            True if a state came from Adam without AMSGrad, whose maximum was then started from its ``exp_avg_sq``.
        """
        converted = False
        with self._lock:
            for optimizer, state in zip(self._optimizers, optimizer_states, strict=True):
                converted |= optimizer.load(state)
            self._barrier.version, self._barrier.filled = version, 0
            self._intake.forget()
            if policy is not None:
                self._intake.load_policy_state(policy)
            if gathered is not None:
                if self._intake.load(gathered):
                    self._barrier.filled = gathered.count
                else:
                    self._barrier.version += 1
        return converted

    def lend(self) -> Tensor:
        """Its own flat buffer, for a run's only worker, which needs no copy: nobody else's update comes between."""
        return self._flat

    def close(self) -> None:
        """Ends the threads of its own; idempotent, and what comes later is done without them."""
        self._team.close()

    def _check_whole(self) -> None:
        """Refuses to show what is half updated.

        Raises:
            HalfUpdatedError: if it is.
        """
        self._whole.check()

    def _copy(self, out: Tensor) -> None:
        if out is not self._flat:
            self._team.copy(out, self._flat)
