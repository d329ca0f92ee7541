"""A session, message by message, over a channel between threads that loses the connection wherever it is told to."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async import AMSGrad
from lightning_async.data.ledger import Ledger
from lightning_async.exchange.session import APPLIED, DROPPED, Session, SessionError
from lightning_async.exchange.worker import RequestRefusedError, Worker
from lightning_async.holder.holder import Holder, Push, Update
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.layout import FlatLayout
from lightning_async.holder.staleness import StalenessBarrier
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.transport.base import Buffers, ChannelClosedError
from lightning_async.transport.fake import Fault, fake_pair
from lightning_async.transport.fields import pack_bitmap
from lightning_async.transport.inprocess import in_process_pair
from lightning_async.transport.message import Kind, Message

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

    def ask(self, message: Message, payload: Tensor | None = None) -> Message:
        """Sends a request and returns the answer."""
        self.channel.send(message, payload)
        return self.channel.receive()

    def push(self, **changes: Any) -> Message:
        """A push for optimizer 0 that fits, but for ``changes``."""
        fields: dict[str, Any] = {
            "worker": RANK,
            "dtype": torch.float32,
            "payload_bytes": 8,
            "groups": HyperparamReader(self.optimizers[0], HyperparamLayout(self.optimizers[0])).packed(),
            "present": pack_bitmap([True]),
        }
        return Message(Kind.PUSH, **(fields | changes))

    def payload(self) -> Tensor:
        out = self.layout.buffer()
        self.channel.receive_payload(out)
        return out

    def ended(self) -> BaseException | None:
        """What the session ended with."""
        self.thread.join(5.0)
        assert not self.thread.is_alive()
        return self.error


def ask(kind: Kind, **fields: Any) -> Message:
    return Message(kind, worker=RANK, **fields)


def test_draw_hands_out_tickets_until_there_are_none() -> None:
    desk = Desk(tickets=3)

    replies = [desk.ask(ask(Kind.DRAW)) for _ in range(4)]

    assert [(reply.kind, reply.ticket, reply.tickets) for reply in replies] == [
        (Kind.TICKETS, 0, 1),
        (Kind.TICKETS, 1, 1),
        # One is kept for the other worker.
        (Kind.TICKETS, 0, 0),
        (Kind.TICKETS, 0, 0),
    ]


@pytest.mark.parametrize("kind", [Kind.PULL, Kind.READ])
def test_pull_and_read_answer_with_parameters_and_their_version(kind: Kind) -> None:
    desk = Desk(barrier=StalenessBarrier(None, version=7))

    reply = desk.ask(ask(kind))

    assert (reply.kind, reply.version, reply.payload_bytes, reply.dtype) == (Kind.PARAMETERS, 7, 16, torch.float32)
    assert desk.payload().equal(torch.ones(4))
    assert desk.barrier.outstanding == ({(RANK, 0): 7} if kind is Kind.PULL else {})


def test_a_push_is_applied_and_answered_with_fresh_parameters_and_the_next_tickets() -> None:
    desk = Desk(tickets=4)
    desk.ask(ask(Kind.DRAW))
    desk.ask(ask(Kind.PULL))
    desk.payload()

    reply = desk.ask(desk.push(tickets=1, ticket=1), torch.ones(2))

    assert (reply.kind, reply.outcome, reply.version) == (Kind.PARAMETERS, APPLIED, 1)
    assert (reply.ticket, reply.tickets) == (1, 1)
    torch.testing.assert_close(desk.payload(), torch.tensor([0.9, 0.9, 1.0, 1.0]))
    assert desk.applied == [0]
    assert desk.barrier.outstanding == {(RANK, 0): 1}


def test_a_push_that_asks_for_tickets_when_there_are_none_leaves_the_barrier() -> None:
    desk = Desk(tickets=1)
    desk.ask(ask(Kind.DRAW))
    desk.ask(ask(Kind.PULL))
    desk.payload()

    reply = desk.ask(desk.push(tickets=1, ticket=1), torch.ones(2))

    assert (reply.tickets, reply.version) == (0, 1)
    desk.payload()
    assert desk.barrier.outstanding == {}


def test_a_push_goes_to_its_own_optimizer() -> None:
    desk = Desk()
    desk.ask(ask(Kind.PULL))
    desk.payload()

    desk.ask(desk.push(optimizer=1), torch.ones(2))

    torch.testing.assert_close(desk.payload(), torch.tensor([1.0, 1.0, 0.9, 0.9]))


def test_a_push_that_is_too_stale_is_dropped_and_said_to_be() -> None:
    desk = Desk(barrier=StalenessBarrier(0, "drop"))
    desk.ask(ask(Kind.PULL))
    desk.payload()
    out = desk.layout.buffer()
    desk.holder.try_pull(0, out)
    desk.holder.try_push(Push(0, 0, 0, [torch.ones(2)], (), tickets=0))

    reply = desk.ask(desk.push(), torch.ones(2))

    assert (reply.outcome, reply.version) == (DROPPED, 1)
    torch.testing.assert_close(desk.payload(), torch.tensor([0.9, 0.9, 1.0, 1.0]))


def test_skip_reports_batches_that_gave_no_gradient() -> None:
    desk = Desk(tickets=3)
    desk.ask(ask(Kind.DRAW))
    desk.ask(ask(Kind.DRAW))

    assert desk.ask(ask(Kind.SKIP, tickets=2)).kind is Kind.ACK

    assert desk.ledger.progress() == (2, 1)
    assert desk.ledger.leased(RANK) == 0


def test_leave_close_and_goodbye() -> None:
    desk = Desk(tickets=3)
    desk.ask(ask(Kind.PULL))
    desk.payload()

    assert desk.ask(ask(Kind.LEAVE)).kind is Kind.ACK
    assert desk.barrier.outstanding == {}
    assert desk.ask(ask(Kind.CLOSE)).kind is Kind.ACK
    assert desk.ask(ask(Kind.DRAW)).tickets == 0
    desk.channel.send(ask(Kind.GOODBYE))
    assert desk.ended() is None


def test_what_a_worker_gives_back_is_handed_to_others() -> None:
    desk = Desk(tickets=2)
    assert desk.ask(ask(Kind.DRAW)).tickets == 1

    assert desk.ask(ask(Kind.RELEASE, tickets=1, outcome=1)).kind is Kind.ACK

    assert desk.ask(ask(Kind.DRAW)).tickets == 0
    assert [list(desk.ledger.draw(0)) for _ in range(3)] == [[0], [1], []]
    reply = desk.ask(ask(Kind.RELEASE, tickets=1))
    assert (reply.kind, reply.text) == (Kind.REFUSE, "worker 1 gives back 1 batches but was handed 0")


ANSWERS = (
    Kind.HELLO,
    Kind.WELCOME,
    Kind.REFUSE,
    Kind.TICKETS,
    Kind.PARAMETERS,
    Kind.ACK,
    Kind.BEAT,
    Kind.ABORT,
)


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_is_either_served_or_refused_by_name(kind: Kind) -> None:
    desk = Desk()

    if kind is Kind.GOODBYE:
        desk.channel.send(ask(kind))
        assert desk.ended() is None
        return
    reply = desk.ask(desk.push() if kind is Kind.PUSH else ask(kind), torch.ones(2) if kind is Kind.PUSH else None)

    # A push from a worker that holds no parameters is refused too.
    assert (reply.kind is Kind.REFUSE) is (kind in ANSWERS or kind is Kind.PUSH)
    if reply.kind is Kind.REFUSE:
        error = desk.ended()
        assert isinstance(error, SessionError)
        assert str(error) == f"worker 1 refused: {reply.text}"
        assert kind is Kind.PUSH or reply.text == f"a worker may not send {kind.name}"


def test_a_run_that_has_failed_is_told_to_whoever_waits() -> None:
    desk = Desk(barrier=StalenessBarrier(0))
    out = desk.layout.buffer()
    desk.holder.try_pull(0, out)
    threading.Timer(0.1, desk.latch.trip, (RunFailure(0, "it ran out of memory"),)).start()

    reply = desk.ask(ask(Kind.PULL))

    assert (reply.kind, reply.worker, reply.text) == (Kind.ABORT, 0, "it ran out of memory")
    assert isinstance(desk.ended(), WorkerFailedError)


def test_a_reason_of_any_length_fits() -> None:
    desk = Desk()
    desk.latch.trip(RunFailure(0, "\N{SNOWMAN}" * 100_000))

    reply = desk.ask(ask(Kind.PULL))

    assert reply.kind is Kind.ABORT
    assert reply.text.startswith("\N{SNOWMAN}" * 1000)


def test_a_refusal_of_any_length_fits() -> None:
    desk = Desk()

    with pytest.raises(SessionError):
        desk.session._refuse("x" * 1_000_000)

    assert desk.channel.receive().text.startswith("x" * 1000)


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


def messages_of_an_epoch() -> list[Kind]:
    sent: list[Kind] = []
    desk = Desk(tickets=4, fault=lambda message: sent.append(message.kind))
    work(desk)
    assert desk.ended() is None
    assert desk.applied == [0, 1]
    assert desk.ledger.progress() == (3, 1)
    torch.testing.assert_close(desk.parameters[0].detach(), torch.full((2,), 0.8))
    assert desk.barrier.outstanding == {}
    return sent


def test_an_epoch_uses_every_request() -> None:
    kinds = messages_of_an_epoch()

    assert set(kinds) == {Kind.DRAW, Kind.PULL, Kind.PUSH, Kind.CLOSE, Kind.SKIP, Kind.LEAVE, Kind.READ, Kind.GOODBYE}
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
    worker._slot.version = 5
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
