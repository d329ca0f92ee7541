"""A session, message by message, over a channel between threads that loses the connection wherever it is told to."""

from __future__ import annotations

import threading
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.data.ledger import Ledger
from lightning_async.exchange.session import Session, SessionError
from lightning_async.exchange.worker import RequestRefusedError, Worker
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.types import Push, Update
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.transport import message as wire
from lightning_async.transport.base import Buffers, ChannelClosedError
from lightning_async.transport.fake import Fault, fake_pair
from lightning_async.transport.fields import pack_bitmap
from lightning_async.transport.inprocess import in_process_pair
from lightning_async.transport.message import (
    Abort,
    Ack,
    Close,
    Draw,
    Goodbye,
    Leave,
    Message,
    Outcome,
    Parameters,
    Pull,
    Read,
    Refuse,
    Release,
    Skip,
    Tickets,
    kind_of,
)

pytestmark = pytest.mark.timeout(30)
RANK = 1
KILLED = RunFailure(RANK, "its process was killed by SIGKILL")


class Desk:
    """One session in a thread of its own, and its worker's end of the channel."""

    def __init__(self, tickets: int = 3, barrier: StalenessBarrier | None = None, fault: Fault | None = None) -> None:
        self.parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
        self.optimizers = [AMSGrad([parameter], lr=0.1) for parameter in self.parameters]
        self.layout = FlatLayout([[parameter] for parameter in self.parameters])
        self.latch = FailureLatch()
        self.barrier = barrier or StalenessBarrier(None)
        self.holder = Holder(
            self.layout, torch.ones(4), self.optimizers, self.barrier, self.latch, observer=self.observe
        )
        self.ledger = Ledger(2)
        self.ledger.begin_epoch(range(tickets))
        self.ledger.open(tickets)
        self.applied: list[int] = []
        self.channel, theirs = fake_pair(self.layout.numel, worker_fault=fault)
        self.session = Session(
            RANK, theirs, self.holder, self.ledger, self.layout, list(map(HyperparamLayout, self.optimizers))
        )
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, args=(theirs,), daemon=True)
        self.thread.start()

    def _serve(self, theirs: Any) -> None:
        try:
            while not self.session.finished:
                self.session.serve_one()
        except BaseException as error:
            self.error = error
            theirs.close()

    def observe(self, update: Update) -> None:
        self.applied += self.ledger.complete(update.push.worker, update.push.tickets)

    def ask(self, message: Message, payload: Tensor | None = None) -> Any:
        """Sends a request and returns the answer."""
        self.channel.send(message, payload)
        return self.channel.receive()

    def push(self, **changes: Any) -> wire.Push:
        """A push for optimizer 0 that fits, but for ``changes``."""
        fields: dict[str, Any] = {
            "worker": RANK,
            "dtype": torch.float32,
            "payload_bytes": 8,
            "hyperparams": HyperparamReader(self.optimizers[0], HyperparamLayout(self.optimizers[0])).packed(),
            "present": pack_bitmap([True]),
        }
        return wire.Push(**(fields | changes))

    def payload(self) -> Tensor:
        out = self.layout.buffer()
        self.channel.receive_payload(out)
        return out

    def ended(self) -> BaseException | None:
        """What the session ended with."""
        self.thread.join(5.0)
        assert not self.thread.is_alive()
        return self.error


def test_draw_hands_out_tickets_until_there_are_none() -> None:
    desk = Desk(tickets=3)

    replies = [desk.ask(Draw(RANK)) for _ in range(4)]

    assert [type(reply) for reply in replies] == [Tickets] * 4
    # One is kept for the other worker.
    assert [list(reply.tickets) for reply in replies] == [[0], [1], [], []]


@pytest.mark.parametrize("request_of", [Pull, Read])
def test_pull_and_read_answer_with_parameters_and_their_version(request_of: type[Pull] | type[Read]) -> None:
    desk = Desk(barrier=StalenessBarrier(None, version=7))

    reply = desk.ask(request_of(RANK))

    assert reply == Parameters(RANK, version=7, payload_bytes=16, dtype=torch.float32)
    assert desk.payload().equal(torch.ones(4))
    assert desk.barrier.outstanding == ({(RANK, 0): 7} if request_of is Pull else {})


def test_a_push_is_applied_and_answered_with_fresh_parameters_and_the_next_tickets() -> None:
    desk = Desk(tickets=4)
    desk.ask(Draw(RANK))
    desk.ask(Pull(RANK))
    desk.payload()

    reply = desk.ask(desk.push(tickets=(range(1),), wants_tickets=True), torch.ones(2))

    assert (type(reply), reply.outcome, reply.version) == (Parameters, Outcome.APPLIED, 1)
    assert reply.tickets == range(1, 2)
    torch.testing.assert_close(desk.payload(), torch.tensor([0.9, 0.9, 1.0, 1.0]))
    assert desk.applied == [0]
    assert desk.barrier.outstanding == {(RANK, 0): 1}


def test_a_push_that_asks_for_tickets_when_there_are_none_leaves_the_barrier() -> None:
    desk = Desk(tickets=1)
    desk.ask(Draw(RANK))
    desk.ask(Pull(RANK))
    desk.payload()

    reply = desk.ask(desk.push(tickets=(range(1),), wants_tickets=True), torch.ones(2))

    assert (len(reply.tickets), reply.version) == (0, 1)
    desk.payload()
    assert desk.barrier.outstanding == {}


def test_a_push_goes_to_its_own_optimizer() -> None:
    desk = Desk()
    desk.ask(Pull(RANK))
    desk.payload()

    desk.ask(desk.push(optimizer=1), torch.ones(2))

    torch.testing.assert_close(desk.payload(), torch.tensor([1.0, 1.0, 0.9, 0.9]))


def test_a_push_that_is_too_stale_is_dropped_and_said_to_be() -> None:
    desk = Desk(barrier=StalenessBarrier(0, "drop"))
    desk.ask(Pull(RANK))
    desk.payload()
    out = desk.layout.buffer()
    desk.holder.try_pull(0, out)
    desk.holder.try_push(Push(0, 0, 0, [torch.ones(2)], ()))

    reply = desk.ask(desk.push(), torch.ones(2))

    assert (reply.outcome, reply.version) == (Outcome.DROPPED, 1)
    torch.testing.assert_close(desk.payload(), torch.tensor([0.9, 0.9, 1.0, 1.0]))


def test_skip_reports_batches_that_gave_no_gradient() -> None:
    desk = Desk(tickets=3)
    desk.ask(Draw(RANK))
    desk.ask(Draw(RANK))

    assert isinstance(desk.ask(Skip(RANK, (range(2),))), Ack)

    assert desk.ledger.progress() == (2, 1)
    assert desk.ledger.leased(RANK) == 0


def test_leave_close_and_goodbye() -> None:
    desk = Desk(tickets=3)
    desk.ask(Pull(RANK))
    desk.payload()

    assert isinstance(desk.ask(Leave(RANK)), Ack)
    assert desk.barrier.outstanding == {}
    assert isinstance(desk.ask(Close(RANK)), Ack)
    assert not desk.ask(Draw(RANK)).tickets
    desk.channel.send(Goodbye(RANK))
    assert desk.ended() is None


def test_what_a_worker_gives_back_is_handed_to_others() -> None:
    desk = Desk(tickets=2)
    assert len(desk.ask(Draw(RANK)).tickets) == 1

    assert isinstance(desk.ask(Release(RANK, (range(1),), stream_over=True)), Ack)

    assert not desk.ask(Draw(RANK)).tickets
    assert [list(desk.ledger.draw(0)) for _ in range(3)] == [[0], [1], []]
    reply = desk.ask(Release(RANK, (range(1),)))
    assert reply == Refuse(RANK, "worker 1 gives back 1 batches but holds 0")


REQUESTS = (Draw, Pull, Read, Skip, Release, Leave, Close)


@pytest.mark.parametrize("kind", get_args(Message))
def test_every_kind_is_either_served_or_refused_by_name(kind: Any) -> None:
    desk = Desk()

    if kind is Goodbye:
        desk.channel.send(kind(RANK))
        assert desk.ended() is None
        return
    reply = desk.ask(desk.push() if kind is wire.Push else kind(RANK), torch.ones(2) if kind is wire.Push else None)

    # A push from a worker that holds no parameters is refused too.
    assert isinstance(reply, Refuse) is (kind not in REQUESTS)
    if isinstance(reply, Refuse):
        error = desk.ended()
        assert isinstance(error, SessionError)
        assert str(error) == f"worker 1 refused: {reply.reason}"
        assert kind is wire.Push or reply.reason == f"a worker may not send {kind_of(kind).name}"


def test_a_push_that_names_tickets_of_others_is_refused_before_its_gradient_is_applied() -> None:
    desk = Desk(tickets=4)
    desk.ask(Draw(RANK))
    desk.ask(Pull(RANK))
    desk.payload()
    theirs = desk.ledger.draw(0)

    reply = desk.ask(desk.push(tickets=(theirs,)))

    assert reply == Refuse(RANK, f"worker 1 reports batch {theirs[0]}, which it does not hold")
    assert isinstance(desk.ended(), SessionError)
    assert (desk.holder.version, desk.applied) == (0, [])


def test_a_run_that_has_failed_is_told_to_whoever_waits() -> None:
    desk = Desk(barrier=StalenessBarrier(0))
    out = desk.layout.buffer()
    desk.holder.try_pull(0, out)
    threading.Timer(0.1, desk.latch.trip, (RunFailure(0, "it ran out of memory"),)).start()

    reply = desk.ask(Pull(RANK))

    assert reply == Abort(worker=0, reason="it ran out of memory")
    assert isinstance(desk.ended(), WorkerFailedError)


def test_a_reason_of_any_length_fits() -> None:
    desk = Desk()
    desk.latch.trip(RunFailure(0, "\N{SNOWMAN}" * 100_000))

    reply = desk.ask(Pull(RANK))

    assert isinstance(reply, Abort)
    assert reply.reason.startswith("\N{SNOWMAN}" * 1000)


def test_a_refusal_of_any_length_fits() -> None:
    desk = Desk()

    with pytest.raises(SessionError):
        desk.session._refuse("x" * 1_000_000)

    reply = desk.channel.receive()
    assert isinstance(reply, Refuse)
    assert reply.reason.startswith("x" * 1000)


# --- the worker's side, and what a lost connection leaves behind -----------------------------------------------------


def work(desk: Desk, batches: int = 2) -> None:
    """What a rank does in an epoch."""
    worker = Worker(RANK, desk.channel, desk.layout, desk.optimizers, desk.latch)
    for _ in range(batches):
        assert len(worker.draw()) == 1
        worker.begin_batch(samples=4)
        for index, parameter in enumerate(desk.parameters):
            parameter.grad = torch.ones_like(parameter)
            assert worker.step(index)
    assert len(worker.draw()) == 1
    worker.begin_batch(samples=4)  # training_step gave no loss
    worker.stop_dispatch()
    worker.finish_segment()
    worker.refresh()
    worker.close()


def messages_of_an_epoch() -> list[type[Message]]:
    sent: list[type[Message]] = []
    desk = Desk(tickets=4, fault=lambda message: sent.append(type(message)))
    work(desk)
    assert desk.ended() is None
    assert desk.applied == [0, 1]
    assert desk.ledger.progress() == (3, 1)
    torch.testing.assert_close(desk.parameters[0].detach(), torch.full((2,), 0.8))
    assert desk.barrier.outstanding == {}
    return sent


def test_an_epoch_uses_every_request() -> None:
    kinds = messages_of_an_epoch()

    assert set(kinds) == {Draw, Pull, wire.Push, Close, Skip, Leave, Read, Goodbye}
    assert len(kinds) == 13


@pytest.mark.parametrize("index", range(12))
def test_a_connection_that_is_lost_at_any_message_leaves_a_state_to_go_on_from(index: int) -> None:
    sent = 0

    def lose(message: Message) -> None:
        nonlocal sent
        sent += 1
        if sent == index + 1:
            desk.latch.trip(KILLED)
            desk.channel.close()
            raise ChannelClosedError("cut by the test")

    desk = Desk(tickets=4, fault=lose)

    with pytest.raises(WorkerFailedError, match="rank 1 failed: its process was killed by SIGKILL"):
        work(desk)

    assert isinstance(desk.ended(), (ChannelClosedError, WorkerFailedError))
    # Nothing is half applied, and every ticket is either applied or can be handed out again, once.
    version = desk.holder.read(desk.layout.buffer())
    assert len(desk.applied) == (version + 1) // 2
    applied, _ = desk.ledger.progress()
    desk.ledger.requeue(RANK)
    desk.ledger.open(4)
    # Rank 1's first batch, if it had none, is still kept for it.
    rest = [ticket for worker in (0, 0, 0, 0, RANK) for ticket in desk.ledger.draw(worker)]
    assert sorted([*range(applied), *rest]) == [0, 1, 2, 3]
    # And nobody waits for it at the barrier.
    desk.holder.leave(RANK)
    assert desk.barrier.outstanding == {}


def test_a_refusal_reaches_the_worker_as_an_error_with_the_reason() -> None:
    desk = Desk()
    worker = Worker(RANK, desk.channel, desk.layout, desk.optimizers, desk.latch)
    worker.draw()
    worker.begin_batch(samples=4)
    worker._turns.slot.version = 5
    desk.parameters[0].grad = torch.ones(2)

    with pytest.raises(RequestRefusedError, match=r"refused rank 1: .* version 5 but holds 0"):
        worker.step(0)


def test_rank_0s_own_worker_takes_the_same_path_without_a_thread() -> None:
    desk = Desk(tickets=4)
    worker_end, session_end, serve_with = in_process_pair(Buffers.allocate(desk.layout.numel, desk.layout.dtype))
    serve_with(
        Session(
            0, session_end, desk.holder, desk.ledger, desk.layout, list(map(HyperparamLayout, desk.optimizers))
        ).serve_one
    )
    worker = Worker(0, worker_end, desk.layout, desk.optimizers, desk.latch)
    threads = threading.active_count()

    assert list(worker.draw()) == [0]
    worker.begin_batch(samples=4)
    desk.parameters[0].grad = torch.ones(2)
    assert worker.step(0)

    assert threading.active_count() == threads
    torch.testing.assert_close(desk.parameters[0].detach(), torch.full((2,), 0.9))
    worker.close()
    with pytest.raises(ChannelClosedError):
        session_end.receive()


def test_tickets_that_came_with_the_push_that_ended_a_segment_are_given_back() -> None:
    desk = Desk(tickets=3)
    worker = Worker(RANK, desk.channel, desk.layout, desk.optimizers, desk.latch)
    worker._draws_with_push = True
    assert list(worker.draw()) == [0]
    worker.begin_batch(samples=4)
    desk.parameters[0].grad = torch.ones(2)
    assert worker.step(0)
    assert desk.ledger.leased(RANK) == 1

    worker.finish_segment()

    assert desk.ledger.leased(RANK) == 0
    assert desk.ledger.progress() == (1, 2)
    worker.close()
    assert desk.ended() is None
