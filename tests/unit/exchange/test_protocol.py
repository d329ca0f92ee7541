"""The protocol under churn: whatever message is a worker's last, and whoever comes back, every batch counts once.

A state machine over what rank 0 is made of (holder, barrier, ledger, server, sessions, roster, evictions, admission)
and workers that speak to it over the fake transport, all in one thread: requests that are held back are resumed after
each change, as the reactor does. ``make soak`` runs the longer form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lightning_async import AMSGrad
from lightning_async.exchange.fence import EvictedError
from lightning_async.exchange.local_service import HolderService
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.service import HolderSpec
from lightning_async.exchange.session import Session
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.types import Update
from lightning_async.runtime.admission import Admission
from lightning_async.runtime.evictions import Evictions
from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.runtime.handshake import PeerInfo
from lightning_async.runtime.roster import Roster
from lightning_async.transport import message as wire
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.fake import FakeChannel, fake_pair
from lightning_async.transport.fields import WireError, pack_bitmap
from lightning_async.transport.message import Message

pytestmark = pytest.mark.timeout(120)

# More than any epoch here takes by fair turns.
_TURNS = 400


class Connection:
    """Stands for a worker's control connection, which an eviction ends."""

    def shutdown(self) -> None:
        return


class Holding:
    """Rank 0 without a trainer: what serves the workers, who is in the run, and what has become of each batch."""

    def __init__(
        self, workers: int, bound: int | None, per_update: int, batches: Any, on_stale: Any, block: int
    ) -> None:
        self.workers, self.bound, self.block = workers, bound, block
        self.waits = on_stale == "wait"
        self.parameter = torch.nn.Parameter(torch.ones(2))
        self.optimizer = AMSGrad([self.parameter], lr=0.1)
        options = ExchangeOptions(
            max_staleness=bound,
            on_stale=on_stale,
            batches=batches,
            gradients_per_update=per_update,
            step_timeout_s=3600.0,
        )
        self.latch = FailureLatch()
        spec = HolderSpec([self.optimizer], options, workers, version=0)
        self.service = HolderService(spec, self.latch, None, self._observe, lambda: None)
        self.server = self.service._server
        self.hyperparams = HyperparamReader(self.optimizer, HyperparamLayout(self.optimizer)).packed()
        self.roster = Roster(range(workers))
        self.evictions = Evictions(self.roster, self.latch)
        self.evictions.under_way = True
        self.evictions.before.append(self._evict)
        self.admission = Admission(self.roster, self.latch, lambda: (0, 0))
        self.admission.let_in, self.admission.admit = self.service.let_in, self.service.admit
        self.serving: Member | None = None
        self.total = 0
        self.applied: Counter[int] = Counter()

    def _evict(self, rank: int, reason: str) -> None:
        self.service.evict(rank)

    def _observe(self, update: Update, tickets: tuple[int, ...]) -> None:
        serving = self.serving
        assert serving is not None
        assert serving.rank == update.push.worker
        assert not serving.evicted, "a gradient of a worker that was taken out of the run is applied"
        if self.waits:
            assert update.applied
        if update.applied and self.bound is not None:
            assert update.staleness <= self.bound, "a gradient is staler than the bound"
        self.applied.update(tickets)

    @property
    def barrier(self) -> StalenessBarrier:
        return self.service.holder._barrier

    @property
    def steps_under_way(self) -> dict[Any, float]:
        steps = self.server._steps
        assert steps is not None
        return dict(steps._began)

    def session(self, rank: int, incarnation: int, channel: FakeChannel) -> Session:
        """What the server does when a worker comes in by the listener."""
        connection: Any = Connection()
        fence = self.server._let_in(PeerInfo(rank, incarnation, {}), connection)
        return self.server._session(rank, channel, 0, fence)

    def begin_epoch(self, tickets: int) -> None:
        self.total = tickets
        self.applied.clear()
        self.service.begin_epoch(range(tickets), self.block)

    def open(self, tickets: int) -> None:
        self.service.open(tickets, self.roster.living)
        self.admission.open(b"")

    def close(self) -> None:
        self.service.close()
        self.latch.free_reserve()


class Member:
    """A worker, message by message; dead ones may still be asked to send what nobody waits for."""

    def __init__(self, holding: Holding, rank: int, incarnation: int) -> None:
        self.rank, self.incarnation = rank, incarnation
        self._holding = holding
        self.mine, self._theirs = fake_pair(holding.service.layout.numel)
        self.session = holding.session(rank, incarnation, self._theirs)
        # The request that the barrier holds back.
        self.held_back: Iterator[None] | None = None
        self._sent: Message | None = None
        self.version = 0
        self.reading = False
        self.waiting: list[int] = []
        self.unreported: list[int] = []
        self.ended = self.arrived = False
        self.silent = False
        self.served = 0

    def __repr__(self) -> str:
        return f"rank {self.rank} (incarnation {self.incarnation})"

    @property
    def evicted(self) -> bool:
        return self.session.fence.closed

    @property
    def is_free(self) -> bool:
        """Whether it lives and waits for no answer."""
        return not self.silent and self.held_back is None

    # --- what it asks ------------------------------------------------------------------------------------------------

    def ask(self, message: Message, payload: torch.Tensor | None = None) -> None:
        self.mine.send(message, payload)
        self._sent = message
        self._advance(self.session.serve(self._theirs.receive()))

    def resume(self) -> bool:
        """Tries again what is held back; whether it went on."""
        assert self.held_back is not None
        self._advance(self.held_back)
        return self.held_back is None

    def go_on(self, message: Message, payload: torch.Tensor | None) -> None:
        """Waits on for what it waits for; sends a message if that is nothing."""
        held_back, self.held_back = self.held_back, None
        if held_back is None:
            self.ask(message, payload)
        else:
            self._advance(held_back)

    def _advance(self, request: Iterator[None]) -> None:
        self._holding.serving = self
        try:
            for _ in request:
                self.held_back = request
                return
        finally:
            self._holding.serving = None
        self.held_back = None
        if not self.silent:
            self._take_answer()

    def _take_answer(self) -> None:
        sent, answer = self._sent, self.mine.receive()
        self.served += 1
        assert not isinstance(answer, (wire.Refuse, wire.Abort)), f"{self} is refused: {answer}"
        if isinstance(sent, wire.Draw):
            assert isinstance(answer, wire.Tickets)
            self.waiting += answer.tickets
            self.ended = not answer.tickets
        elif isinstance(sent, (wire.Pull, wire.Push)):
            assert isinstance(answer, wire.Parameters)
            self.mine.receive_payload(self.mine.buffers.parameters)
            self.version, self.reading = answer.version, True
            if isinstance(sent, wire.Push) and sent.wants_tickets:
                self.waiting += answer.tickets
                self.ended, self.reading = not answer.tickets, bool(answer.tickets)

    def push_message(self, wants_tickets: bool) -> wire.Push:
        tickets, self.unreported = self.unreported, []
        return wire.Push(
            worker=self.rank,
            version=self.version,
            tickets=as_ranges(tickets),
            samples=len(tickets),
            wants_tickets=wants_tickets,
            dtype=torch.float32,
            payload_bytes=8,
            hyperparams=self._holding.hyperparams,
            present=pack_bitmap([True]),
        )

    # --- its steps ---------------------------------------------------------------------------------------------------

    def draw(self) -> None:
        self.ask(wire.Draw(self.rank))

    def begin_batch(self) -> None:
        """Begins its next batch, at parameters that it pulls for it if it has none."""
        if not self.reading:
            self.ask(wire.Pull(self.rank))
        else:
            self.unreported.append(self.waiting.pop(0))

    def push(self, wants_tickets: bool) -> None:
        self.ask(self.push_message(wants_tickets), torch.ones(2))

    def skip(self) -> None:
        tickets, self.unreported = self.unreported, []
        self.ask(wire.Skip(self.rank, as_ranges(tickets)))

    def release(self) -> None:
        tickets, self.waiting = self.waiting, []
        self.ask(wire.Release(self.rank, as_ranges(tickets)))

    def leave(self) -> None:
        self.ask(wire.Leave(self.rank))
        self.reading = False

    def finish(self) -> None:
        """Its part of the segment is over, as in `Worker.finish_segment`."""
        if self.unreported:
            self.skip()
        self.leave()
        if self.waiting:
            self.release()
        if self.rank == 0:
            self._holding.admission.shut()
        self.arrived = True

    def work(self) -> None:
        """What a worker does next that has nothing else in mind."""
        if self.ended and not self.waiting and not self.unreported:
            self.finish()
        elif self.unreported and (len(self.unreported) == self._holding.block or not self.waiting):
            self.push(wants_tickets=not self.waiting)
        elif self.waiting:
            self.begin_batch()
        else:
            self.draw()

    def begin_segment(self) -> None:
        self.ended = self.arrived = False


def as_ranges(tickets: list[int]) -> tuple[range, ...]:
    return tuple(range(ticket, ticket + 1) for ticket in tickets)


class Protocol(RuleBasedStateMachine):
    """Workers that draw, pull, push, leave, die and come back, in any order."""

    holding: Holding

    @initialize(
        workers=st.integers(2, 4),
        bound=st.sampled_from([0, 1, 3, None]),
        per_update=st.integers(1, 3),
        batches=st.sampled_from(["shared", "sharded"]),
        on_stale=st.sampled_from(["wait", "wait", "drop"]),
        block=st.integers(1, 2),
        tickets=st.integers(1, 16),
    )
    def begin(self, tickets: int, **how: Any) -> None:
        self.holding = Holding(**how)
        # All that ever were, of whom those count that are not evicted.
        self.members = [Member(self.holding, rank, 0) for rank in range(how["workers"])]
        # Joiners that have dialed and are not in yet, with the segment whose state they have.
        self.at_the_door: list[tuple[Member, int]] = []
        self.holding.begin_epoch(tickets)
        self.open(tickets)

    def teardown(self) -> None:
        if not hasattr(self, "holding"):
            return
        try:
            self.finish_epoch()
        finally:
            self.holding.close()

    # --- who is there ------------------------------------------------------------------------------------------------

    @property
    def in_run(self) -> list[Member]:
        return [member for member in self.members if not member.evicted]

    @property
    def living(self) -> list[Member]:
        return [member for member in self.in_run if not member.silent]

    @property
    def lost(self) -> list[Member]:
        """Dead, or stopped, and not noticed yet."""
        return [member for member in self.in_run if member.silent]

    def pick(self, members: list[Member], choice: int) -> Member:
        return members[choice % len(members)]

    def at_work(self) -> list[Member]:
        return [member for member in self.living if member.is_free and not member.arrived]

    # --- the workers' steps -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.at_work())
    @rule(choice=st.integers(0, 3), steps=st.integers(1, 4))
    def work(self, choice: int, steps: int) -> None:
        member = self.pick(self.at_work(), choice)
        for _ in range(steps):
            if member.is_free and not member.arrived:
                member.work()
                self.settle()

    @precondition(lambda self: any(member.unreported for member in self.at_work()))
    @rule(choice=st.integers(0, 3))
    def skip(self, choice: int) -> None:
        self.pick([member for member in self.at_work() if member.unreported], choice).skip()
        self.settle()

    @precondition(lambda self: any(member.waiting for member in self.at_work()))
    @rule(choice=st.integers(0, 3))
    def release(self, choice: int) -> None:
        self.pick([member for member in self.at_work() if member.waiting], choice).release()
        self.settle()

    @precondition(lambda self: any(member.reading and not member.unreported for member in self.at_work()))
    @rule(choice=st.integers(0, 3))
    def leave(self, choice: int) -> None:
        self.pick([each for each in self.at_work() if each.reading and not each.unreported], choice).leave()
        self.settle()

    @precondition(lambda self: self.at_work())
    @rule(choice=st.integers(0, 3))
    def stop_dispatch(self, choice: int) -> None:
        member = self.pick(self.at_work(), choice)
        member.ask(wire.Close(member.rank))

    # --- deaths and what follows --------------------------------------------------------------------------------------

    @precondition(lambda self: [member for member in self.living if member.rank > 0])
    @rule(choice=st.integers(0, 3), message=st.sampled_from(["none", "unread", "half"]))
    def die(self, choice: int, message: str) -> None:
        """A worker falls silent: before, in the middle of, or after its next message, or while it is held back."""
        member = self.pick([member for member in self.living if member.rank > 0], choice)
        able = member.held_back is None and not member.arrived
        member.silent = True
        if not able or message == "none":
            return
        if message == "half":
            if member.reading:
                # The connection is lost before the gradient has arrived.
                with pytest.raises(ChannelClosedError):
                    member.ask(member.push_message(wants_tickets=True))
            return
        if member.reading and member.unreported:
            member.ask(member.push_message(wants_tickets=True), torch.ones(2))
        elif member.reading or member.waiting:
            member.ask(wire.Draw(member.rank))
        else:
            member.ask(wire.Pull(member.rank))
        self.settle()

    @precondition(lambda self: self.lost)
    @rule(choice=st.integers(0, 3))
    def notice(self, choice: int) -> None:
        self.evict(self.pick(self.lost, choice))

    @precondition(lambda self: any(member.evicted for member in self.members))
    @rule(choice=st.integers(0, 9), kind=st.integers(0, 7))
    def come_to_life_too_late(self, choice: int, kind: int) -> None:
        """A stopped worker goes on as if nothing had happened: it changes nothing."""
        member = self.pick([member for member in self.members if member.evicted], choice)
        before = self.state()
        held = [*range(self.holding.total)][:1]
        messages: list[tuple[Message, torch.Tensor | None]] = [
            (wire.Draw(member.rank), None),
            (wire.Pull(member.rank), None),
            (wire.Skip(member.rank, as_ranges(held)), None),
            (wire.Release(member.rank, as_ranges(held), stream_over=True), None),
            (wire.Leave(member.rank), None),
            (wire.Close(member.rank), None),
            (member.push_message(wants_tickets=True), torch.ones(2)),
            (wire.Pull(member.rank, counts=b""), None),
        ]
        with pytest.raises((EvictedError, WireError)):
            member.go_on(*messages[kind])
        assert self.state() == before

    @precondition(lambda self: len(self.in_run) + len(self.at_the_door) < 5)
    @rule(choice=st.integers(0, 3))
    def knock(self, choice: int) -> None:
        """A lost rank is started again, or a new one comes: it dials, and takes over a segment's state."""
        there = {member.rank for member in self.in_run} | {member.rank for member, _ in self.at_the_door}
        gone = sorted({member.rank for member in self.members} - there)
        asked = None if not gone else gone[choice % len(gone)]
        admission = self.holding.admission
        rank, incarnation = admission._number(PeerInfo(1, 0, {"joins_as": asked}))
        admission.let_in(rank)
        self.at_the_door.append((Member(self.holding, rank, incarnation), admission._segment))

    @precondition(lambda self: self.at_the_door)
    @rule(choice=st.integers(0, 3), dies=st.booleans())
    def come_in(self, choice: int, dies: bool) -> None:
        member, segment = self.at_the_door.pop(choice % len(self.at_the_door))
        if dies:
            # Nobody misses it; its connection is all that ends.
            self.holding.server._end(member.session.fence, 0, None)
            return
        admission = self.holding.admission
        admitted = admission._try_to_admit(member.rank, member.incarnation, segment)
        under_way = admission._state is not None
        assert (admitted is not None) == (under_way and segment == admission._segment)
        if admitted is None:
            # It takes over the state of the next segment.
            self.at_the_door.append((member, admission._segment + (not under_way)))
            return
        member.begin_segment()
        self.members.append(member)

    def evict(self, member: Member) -> None:
        self.holding.evictions.lose(RunFailure(member.rank, "its process was killed by SIGKILL"))
        assert self.holding.latch.failure is None
        assert member.evicted
        self.settle()

    # --- where the ranks meet -----------------------------------------------------------------------------------------

    def all_have_arrived(self) -> bool:
        return all(member.arrived for member in self.in_run)

    @precondition(lambda self: self.all_have_arrived())
    @rule(tickets=st.integers(1, 16))
    def meet(self, tickets: int) -> None:
        """A segment ends, and with it the epoch where nothing is left of it; the next one begins."""
        service = self.holding.service
        done, left = service.progress()
        assert done + left == self.holding.total, "a batch is neither applied nor left when the ranks have met"
        assert not self.holding.barrier.outstanding
        if not left:
            self.check_epoch()
            service.complete_version()
            self.holding.begin_epoch(tickets)
        self.open(tickets)

    def open(self, tickets: int) -> None:
        self.holding.open(tickets)
        for member in self.in_run:
            member.begin_segment()

    def check_epoch(self) -> None:
        once = dict.fromkeys(range(self.holding.total), 1)
        assert self.holding.applied + self.skipped() == Counter(once), "not every batch counts once"

    def skipped(self) -> Counter[int]:
        """Batches without a gradient, which the ledger alone hears of."""
        marked = {ticket for pair in self.holding.service.ledger.applied() for ticket in range(*pair)}
        return Counter(dict.fromkeys(marked - self.holding.applied.keys(), 1))

    # --- what always holds --------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Resumes what is held back until nothing goes on, as the reactor does after a change."""
        moved = True
        while moved:
            held = [member for member in self.in_run if member.held_back is not None]
            moved = sum(member.resume() for member in held) > 0

    def state(self) -> object:
        """What a worker's request may change."""
        service, barrier = self.holding.service, self.holding.barrier
        ledger = service.ledger
        leased = {worker: frozenset(tickets) for worker, tickets in ledger._leased.items()}
        closed, over = ledger._closed, frozenset(ledger._over)
        steps = self.holding.steps_under_way
        return (
            barrier.version,
            barrier.filled,
            barrier.outstanding,
            barrier.waiting,
            leased,
            ledger.applied(),
            closed,
            over,
            steps,
        )

    @invariant()
    def every_batch_is_in_one_place(self) -> None:
        ledger = self.holding.service.ledger
        applied, undrawn = ledger.progress()
        leased = {worker: len(tickets) for worker, tickets in ledger._leased.items() if tickets}
        assert applied + undrawn + sum(leased.values()) == self.holding.total
        assert leased.keys() <= {*self.holding.roster.living}
        assert {worker for worker, _ in self.holding.steps_under_way} <= {*self.holding.roster.living}
        assert max(self.holding.applied.values(), default=0) <= 1, "a batch counts twice"
        for member in self.living:
            if member.held_back is None:
                assert len(member.waiting) + len(member.unreported) == leased.get(member.rank, 0), member

    @invariant()
    def only_ranks_in_the_run_are_waited_for(self) -> None:
        barrier = self.holding.barrier
        ranks = {worker for worker, _ in [*barrier.outstanding, *barrier.waiting]}
        assert ranks <= {*self.holding.roster.living}
        assert tuple(sorted(member.rank for member in self.in_run)) == self.holding.roster.living

    @invariant()
    def someone_can_go_on(self) -> None:
        if self.lost or self.all_have_arrived():
            return
        assert self.at_work(), "every worker waits for another"

    # --- and in the end -----------------------------------------------------------------------------------------------

    def finish_epoch(self) -> None:
        """Whatever has happened: once the dead are noticed, the living finish the epoch, and each is served."""
        for member in self.lost:
            self.evict(member)
        for _ in range(_TURNS):
            for member in self.at_work():
                member.work()
                self.settle()
            self.only_ranks_in_the_run_are_waited_for()
            self.every_batch_is_in_one_place()
            if not self.all_have_arrived():
                continue
            assert all(member.held_back is None for member in self.living), "a living worker is not served"
            _, left = self.holding.service.progress()
            if not left:
                break
            self.open(left)
        else:
            raise AssertionError("the living do not come to the end of the epoch")
        self.check_epoch()


def _run(examples: int, steps: int, in_suite: bool) -> None:
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=in_suite,
            # To make a failing run shorter takes minutes.
            phases=[Phase.generate] if in_suite else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_batch_counts_once_whoever_dies_and_comes_back() -> None:
    _run(examples=80, steps=40, in_suite=True)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_batch_counts_once_in_many_more_runs() -> None:
    _run(examples=20_000, steps=80, in_suite=False)
