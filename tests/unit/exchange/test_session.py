"""A session, message by message, over a channel between threads that loses the connection wherever it is told to."""

from __future__ import annotations

import threading
from typing import Any, get_args

import pytest
import torch

from lightning_async.exchange.session import SessionError
from lightning_async.exchange.worker import RequestRefusedError
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.types import Push
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.transport import message as wire
from lightning_async.transport.base import Buffers, ChannelClosedError
from lightning_async.transport.fake import Fault
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
from tests.harness import Exchange, ServedSession

pytestmark = pytest.mark.timeout(30)
RANK = 1
KILLED = RunFailure(RANK, "its process was killed by SIGKILL")


def start(
    tickets: int = 3, barrier: StalenessBarrier | None = None, fault: Fault | None = None
) -> tuple[Exchange, ServedSession]:
    """Rank 1's session with two optimizers, in a thread of its own."""
    exchange = Exchange([2], [2], tickets=tickets, barrier=barrier)
    return exchange, exchange.serve(RANK, fault=fault)


def test_draw_hands_out_tickets_until_there_are_none() -> None:
    _, served = start(tickets=3)

    replies = [served.ask(Draw(RANK)) for _ in range(4)]

    assert [type(reply) for reply in replies] == [Tickets] * 4
    # One is kept for the other worker.
    assert [list(reply.tickets) for reply in replies] == [[0], [1], [], []]


@pytest.mark.parametrize("request_of", [Pull, Read])
def test_pull_and_read_answer_with_parameters_and_their_version(request_of: type[Pull] | type[Read]) -> None:
    exchange, served = start(barrier=StalenessBarrier(None, version=7))

    reply = served.ask(request_of(RANK))

    assert reply == Parameters(RANK, version=7, payload_bytes=16, dtype=torch.float32)
    assert served.payload().equal(torch.ones(4))
    assert exchange.barrier.outstanding == ({(RANK, 0): 7} if request_of is Pull else {})


def test_a_push_is_applied_and_answered_with_fresh_parameters_and_the_next_tickets() -> None:
    exchange, served = start(tickets=4)
    served.ask(Draw(RANK))
    served.ask(Pull(RANK))
    served.payload()

    reply = served.ask(exchange.push(RANK, tickets=(range(1),), wants_tickets=True), torch.ones(2))

    assert (type(reply), reply.outcome, reply.version) == (Parameters, Outcome.APPLIED, 1)
    assert reply.tickets == range(1, 2)
    torch.testing.assert_close(served.payload(), torch.tensor([0.9, 0.9, 1.0, 1.0]))
    assert exchange.applied == [0]
    assert exchange.barrier.outstanding == {(RANK, 0): 1}


def test_a_push_that_asks_for_tickets_when_there_are_none_leaves_the_barrier() -> None:
    exchange, served = start(tickets=1)
    served.ask(Draw(RANK))
    served.ask(Pull(RANK))
    served.payload()

    reply = served.ask(exchange.push(RANK, tickets=(range(1),), wants_tickets=True), torch.ones(2))

    assert (len(reply.tickets), reply.version) == (0, 1)
    served.payload()
    assert exchange.barrier.outstanding == {}


def test_a_push_goes_to_its_own_optimizer() -> None:
    exchange, served = start()
    served.ask(Pull(RANK))
    served.payload()

    served.ask(exchange.push(RANK, optimizer=1), torch.ones(2))

    torch.testing.assert_close(served.payload(), torch.tensor([1.0, 1.0, 0.9, 0.9]))


def test_a_push_that_is_too_stale_is_dropped_and_said_to_be() -> None:
    exchange, served = start(barrier=StalenessBarrier(0, "drop"))
    served.ask(Pull(RANK))
    served.payload()
    out = exchange.layout.buffer()
    exchange.holder.try_pull(0, out)
    exchange.holder.try_push(Push(0, 0, 0, [torch.ones(2)], ()))

    reply = served.ask(exchange.push(RANK), torch.ones(2))

    assert (reply.outcome, reply.version) == (Outcome.DROPPED, 1)
    torch.testing.assert_close(served.payload(), torch.tensor([0.9, 0.9, 1.0, 1.0]))


def test_a_push_that_is_not_finite_is_rejected_its_batch_done_and_the_next_ticket_handed_out() -> None:
    exchange, served = start(tickets=4)
    served.ask(Draw(RANK))
    served.ask(Pull(RANK))
    served.payload()

    push = exchange.push(RANK, tickets=(range(1),), wants_tickets=True, finite=False)
    reply = served.ask(push, torch.full((2,), torch.nan))

    assert (reply.outcome, reply.version, reply.tickets) == (Outcome.REJECTED, 0, range(1, 2))
    assert served.payload().equal(torch.ones(4))
    assert exchange.applied == [0]
    assert exchange.barrier.outstanding == {(RANK, 0): 0}


def test_skip_reports_batches_that_gave_no_gradient() -> None:
    exchange, served = start(tickets=3)
    served.ask(Draw(RANK))
    served.ask(Draw(RANK))

    assert isinstance(served.ask(Skip(RANK, (range(2),))), Ack)

    assert exchange.ledger.progress() == (2, 1)
    assert exchange.ledger.leased(RANK) == 0


def test_leave_close_and_goodbye() -> None:
    exchange, served = start(tickets=3)
    served.ask(Pull(RANK))
    served.payload()

    assert isinstance(served.ask(Leave(RANK)), Ack)
    assert exchange.barrier.outstanding == {}
    assert isinstance(served.ask(Close(RANK)), Ack)
    assert not served.ask(Draw(RANK)).tickets
    served.channel.send(Goodbye(RANK))
    assert served.ended() is None


def test_what_a_worker_gives_back_is_handed_to_others() -> None:
    exchange, served = start(tickets=2)
    assert len(served.ask(Draw(RANK)).tickets) == 1

    assert isinstance(served.ask(Release(RANK, (range(1),), stream_over=True)), Ack)

    assert not served.ask(Draw(RANK)).tickets
    assert [list(exchange.ledger.draw(0)) for _ in range(3)] == [[0], [1], []]
    reply = served.ask(Release(RANK, (range(1),)))
    assert reply == Refuse(RANK, "worker 1 gives back 1 batches but holds 0")


REQUESTS = (Draw, Pull, Read, Skip, Release, Leave, Close)


@pytest.mark.parametrize("kind", get_args(Message))
def test_every_kind_is_either_served_or_refused_by_name(kind: Any) -> None:
    exchange, served = start()

    if kind is Goodbye:
        served.channel.send(kind(RANK))
        assert served.ended() is None
        return
    reply = served.ask(
        exchange.push(RANK) if kind is wire.Push else kind(RANK), torch.ones(2) if kind is wire.Push else None
    )

    # A push from a worker that holds no parameters is refused too.
    assert isinstance(reply, Refuse) is (kind not in REQUESTS)
    if isinstance(reply, Refuse):
        error = served.ended()
        assert isinstance(error, SessionError)
        assert str(error) == f"worker 1 refused: {reply.reason}"
        assert kind is wire.Push or reply.reason == f"a worker may not send {kind_of(kind).name}"


def test_a_push_that_names_tickets_of_others_is_refused_before_its_gradient_is_applied() -> None:
    exchange, served = start(tickets=4)
    served.ask(Draw(RANK))
    served.ask(Pull(RANK))
    served.payload()
    theirs = exchange.ledger.draw(0)

    reply = served.ask(exchange.push(RANK, tickets=(theirs,)))

    assert reply == Refuse(RANK, f"worker 1 reports batch {theirs[0]}, which it does not hold")
    assert isinstance(served.ended(), SessionError)
    assert (exchange.holder.version, exchange.applied) == (0, [])


def test_a_run_that_has_failed_is_told_to_whoever_waits() -> None:
    exchange, served = start(barrier=StalenessBarrier(0))
    out = exchange.layout.buffer()
    exchange.holder.try_pull(0, out)
    threading.Timer(0.1, exchange.latch.trip, (RunFailure(0, "it ran out of memory"),)).start()

    reply = served.ask(Pull(RANK))

    assert reply == Abort(worker=0, reason="it ran out of memory")
    assert isinstance(served.ended(), WorkerFailedError)


def test_a_reason_of_any_length_fits() -> None:
    exchange, served = start()
    exchange.latch.trip(RunFailure(0, "\N{SNOWMAN}" * 100_000))

    reply = served.ask(Pull(RANK))

    assert isinstance(reply, Abort)
    assert reply.reason.startswith("\N{SNOWMAN}" * 1000)


def test_a_refusal_of_any_length_fits() -> None:
    _, served = start()

    with pytest.raises(SessionError):
        served.session._refuse("x" * 1_000_000)

    reply = served.channel.receive()
    assert isinstance(reply, Refuse)
    assert reply.reason.startswith("x" * 1000)


# --- the worker's side, and what a lost connection leaves behind -----------------------------------------------------


def work(exchange: Exchange, served: ServedSession, batches: int = 2) -> None:
    """What a rank does in an epoch."""
    worker = exchange.worker(RANK, served.channel)
    for _ in range(batches):
        assert len(worker.draw()) == 1
        worker.begin_batch(samples=4)
        for index, (parameter,) in enumerate(exchange.parameters):
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
    exchange, served = start(tickets=4, fault=lambda message: sent.append(type(message)))
    work(exchange, served)
    assert served.ended() is None
    assert exchange.applied == [0, 1]
    assert exchange.ledger.progress() == (3, 1)
    torch.testing.assert_close(exchange.parameters[0][0].detach(), torch.full((2,), 0.8))
    assert exchange.barrier.outstanding == {}
    return sent


def test_an_epoch_uses_every_request() -> None:
    kinds = messages_of_an_epoch()

    assert set(kinds) == {Draw, Pull, wire.Push, Close, Skip, Leave, Read, Goodbye}
    assert len(kinds) == 14


@pytest.mark.parametrize("index", range(13))
def test_a_connection_that_is_lost_at_any_message_leaves_a_state_to_go_on_from(index: int) -> None:
    sent = 0

    def lose(message: Message) -> None:
        nonlocal sent
        sent += 1
        if sent == index + 1:
            exchange.latch.trip(KILLED)
            served.channel.close()
            raise ChannelClosedError("cut by the test")

    exchange, served = start(tickets=4, fault=lose)

    with pytest.raises(WorkerFailedError, match="rank 1 failed: its process was killed by SIGKILL"):
        work(exchange, served)

    assert isinstance(served.ended(), (ChannelClosedError, WorkerFailedError))
    # Nothing is half applied, and every ticket is either applied or can be handed out again, once.
    version = exchange.holder.read(exchange.layout.buffer())
    assert len(exchange.applied) == (version + 1) // 2
    applied, _ = exchange.ledger.progress()
    exchange.ledger.requeue(RANK)
    exchange.ledger.open(4)
    # Rank 1's first batch, if it had none, is still kept for it.
    rest = [ticket for worker in (0, 0, 0, 0, RANK) for ticket in exchange.ledger.draw(worker)]
    assert sorted([*range(applied), *rest]) == [0, 1, 2, 3]
    # And nobody waits for it at the barrier.
    exchange.holder.leave(RANK)
    assert exchange.barrier.outstanding == {}


def test_a_refusal_reaches_the_worker_as_an_error_with_the_reason() -> None:
    exchange, served = start()
    worker = exchange.worker(RANK, served.channel)
    worker.draw()
    worker.begin_batch(samples=4)
    worker._turns.slot.version = 5
    exchange.parameters[0][0].grad = torch.ones(2)

    with pytest.raises(RequestRefusedError, match=r"refused rank 1: .* version 5 but holds 0"):
        worker.step(0)


def test_rank_0s_own_worker_takes_the_same_path_without_a_thread() -> None:
    exchange, _ = start(tickets=4)
    worker_end, session_end, serve_with = in_process_pair(
        Buffers.allocate(exchange.layout.numel, exchange.layout.dtype)
    )
    serve_with(exchange.session(0, session_end).serve_one)
    worker = exchange.worker(0, worker_end)
    threads = threading.active_count()

    assert list(worker.draw()) == [0]
    worker.begin_batch(samples=4)
    exchange.parameters[0][0].grad = torch.ones(2)
    assert worker.step(0)

    assert threading.active_count() == threads
    torch.testing.assert_close(exchange.parameters[0][0].detach(), torch.full((2,), 0.9))
    worker.close()
    with pytest.raises(ChannelClosedError):
        session_end.receive()


def test_tickets_that_came_with_the_push_that_ended_a_segment_are_given_back() -> None:
    exchange, served = start(tickets=3)
    worker = exchange.worker(RANK, served.channel)
    worker._draws_with_push = True
    assert list(worker.draw()) == [0]
    worker.begin_batch(samples=4)
    exchange.parameters[0][0].grad = torch.ones(2)
    assert worker.step(0)
    assert exchange.ledger.leased(RANK) == 1

    worker.finish_segment()

    assert exchange.ledger.leased(RANK) == 0
    assert exchange.ledger.progress() == (1, 2)
    worker.close()
    assert served.ended() is None
