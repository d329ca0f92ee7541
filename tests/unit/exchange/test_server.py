"""An evicted worker is out at once, whatever it is in the middle of; its next incarnation is served as a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from lightning_async import AMSGrad
from lightning_async.exchange.local_service import HolderService
from lightning_async.exchange.negotiation import dial, transport_of
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.exchange.service import HolderSpec
from lightning_async.holder.hyperparams import HyperparamLayout, HyperparamReader
from lightning_async.holder.types import Update
from lightning_async.runtime.failure import FailureLatch, RunFailure
from lightning_async.runtime.handshake import HandshakeError
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.codec import encode
from lightning_async.transport.fields import pack_bitmap
from lightning_async.transport.message import Draw, Goodbye, Message, Outcome, Parameters, Pull, Push, Skip
from tests.harness import Call, Entrance, eventually

pytestmark = pytest.mark.timeout(60)
TICKETS, BOUND = 6, 1


class Peer:
    """A worker that says what the test has it say."""

    def __init__(self, town: Served, rank: int, incarnation: int) -> None:
        self.rank, self.incarnation, self._town = rank, incarnation, town
        self.channel = dial(town.address, rank, town.service.layout, town.groups, incarnation)

    def ask(self, message: Message, payload: torch.Tensor | None = None) -> Any:
        self.channel.send(message, payload)
        answer = self.channel.receive()
        if isinstance(answer, Parameters):
            self.channel.receive_payload(self.channel.buffers.parameters)
        return answer

    def draw(self) -> list[int]:
        return list(self.ask(Draw(self.rank)).tickets)

    def pull(self) -> int:
        return int(self.ask(Pull(self.rank)).version)

    def push_of(self, version: int, *tickets: int) -> tuple[Push, torch.Tensor]:
        gradient = self.channel.buffers.gradient
        gradient.fill_(1.0)
        message = Push(
            worker=self.rank,
            version=version,
            tickets=tuple(range(ticket, ticket + 1) for ticket in tickets),
            dtype=torch.float32,
            payload_bytes=gradient.nbytes,
            hyperparams=self._town.hyperparams,
            present=pack_bitmap([True]),
        )
        return message, gradient

    def push(self, version: int, *tickets: int) -> Call:
        """Waits for the answer in a thread of its own."""
        return Call(lambda: self.ask(*self.push_of(version, *tickets)))


class Served:
    """Rank 0's service for three workers, and those that have come to it."""

    def __init__(self, transport: Any) -> None:
        optimizer = AMSGrad([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        self.groups = [HyperparamLayout(optimizer)]
        self.hyperparams = HyperparamReader(optimizer, self.groups[0]).packed()
        self.latch = FailureLatch()
        self.entrance = Entrance(3, self.latch)
        self.address = self.entrance.listener.address
        self.lost: list[tuple[int, str]] = []
        self.applied: list[tuple[int, tuple[int, ...]]] = []
        self.service = HolderService(
            HolderSpec([optimizer], ExchangeOptions(max_staleness=BOUND, transport=transport), 3, 0),
            self.latch,
            self.entrance.listener,
            self._observe,
            lambda: None,
            on_lost=lambda rank, reason: self.lost.append((rank, reason)),
        )
        self.service.begin_epoch(range(TICKETS))
        self.service.open(TICKETS)
        self.peers: list[Peer] = []

    def _observe(self, update: Update, tickets: tuple[int, ...]) -> None:
        self.applied.append((update.push.worker, tickets))

    def come(self, rank: int, incarnation: int = 0) -> Peer:
        self.peers.append(Peer(self, rank, incarnation))
        return self.peers[-1]

    def close(self) -> None:
        for peer in self.peers:
            with suppress(ChannelClosedError):
                peer.channel.send(Goodbye(peer.rank))
        self.service.close()
        for peer in self.peers:
            peer.channel.close()
        self.entrance.close()
        assert self.latch.failure is None
        self.latch.free_reserve()


@pytest.fixture(params=["shm", "tcp"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    town = Served(request.param)
    yield town
    town.close()


def parked(served: Served) -> tuple[Peer, Peer, Call]:
    """Rank 1, whose second push the barrier holds back until rank 2, which has read before it, has pushed."""
    first, second = served.come(1), served.come(2)
    tickets = [*first.draw(), *second.draw(), *first.draw()]
    assert tickets == [0, 1, 2]
    assert (first.pull(), second.pull()) == (0, 0)
    assert first.push(0, 0).outcome().outcome is Outcome.APPLIED
    held_back = first.push(1, 2)
    assert held_back.waits()
    return first, second, held_back


def test_a_push_that_is_held_back_counts_for_nothing_once_its_worker_is_out(served: Served) -> None:
    _, second, held_back = parked(served)

    assert served.service.evict(1) == 1

    assert isinstance(held_back.ended(), ChannelClosedError)
    assert second.push(0, 1).outcome().version == 2
    assert served.applied == [(1, (0,)), (2, (1,))]
    # What it was handed is handed out first.
    assert [second.draw() for _ in range(4)] == [[2], [3], [4], []]


def test_who_is_held_back_for_an_evicted_workers_sake_goes_on_at_once(served: Served) -> None:
    first, _, held_back = parked(served)

    assert served.service.evict(2) == 1

    answer = held_back.outcome()
    assert (answer.outcome, answer.version) == (Outcome.APPLIED, 2)
    assert first.draw() == [1]


def test_a_push_that_ends_in_its_middle_counts_for_nothing(served: Served) -> None:
    first, second = served.come(1), served.come(2)
    (ticket,) = first.draw()
    assert first.pull() == 0
    message, _ = first.push_of(0, ticket)
    channel: Any = first.channel
    if transport_of(channel) == "tcp":
        # Announced, and its gradient never comes.
        channel._control.send(message)
    else:
        # The gradient lies in shared memory by now, and half of what announces it has come.
        data = encode(message)
        channel._control._socket.sendall(data[: len(data) // 2])
    first.channel.close()

    assert eventually(lambda: served.lost)
    assert [rank for rank, _ in served.lost] == [1]
    assert served.service.evict(1) == 1
    assert (served.applied, served.service.progress()) == ([], (0, TICKETS))
    assert second.draw() == [ticket]
    assert second.pull() == 0


def test_the_next_incarnation_is_served_and_the_first_one_is_not_let_in_again(served: Served) -> None:
    first = served.come(1)
    assert first.draw() == [0]
    served.service.evict(1)
    with pytest.raises(HandshakeError, match="rank 1 was taken out of the run"):
        served.come(1, incarnation=1)

    served.service.let_in(1)
    second = served.come(1, incarnation=1)
    served.service.admit(1)
    with pytest.raises(HandshakeError, match="rank 1 is here already"):
        served.come(1)

    assert second.draw() == [0]
    assert second.pull() == 0
    assert second.push(0, 0).outcome().outcome is Outcome.APPLIED
    assert served.applied == [(1, (0,))]


def test_what_the_first_incarnation_sends_late_changes_nothing_of_the_next_ones(served: Served) -> None:
    first = served.come(1)
    assert first.draw() == [0]
    assert first.pull() == 0
    served.service.evict(1)
    served.service.let_in(1)
    second = served.come(1, incarnation=1)
    served.service.admit(1)
    assert second.draw() == [0]
    assert second.pull() == 0

    # As a process that was stopped, and goes on with what it was about to send.
    for late in (Draw(1), Skip(1, (range(1),)), Pull(1)):
        with pytest.raises(ChannelClosedError):
            first.ask(late)

    assert served.service.ledger.leased(1) == 1
    assert served.service.holder._barrier.outstanding == {(1, 0): 0}
    assert second.push(0, 0).outcome().outcome is Outcome.APPLIED
    assert served.lost == []


def test_a_worker_beyond_those_that_the_run_began_with_is_let_in(served: Served) -> None:
    with pytest.raises(HandshakeError, match="no 'control' for rank 5 among 3 ranks"):
        served.come(5)

    served.service.let_in(5)
    newcomer = served.come(5)
    served.service.admit(5)

    assert newcomer.draw() == [0]
    assert newcomer.pull() == 0
    assert newcomer.push(0, 0).outcome().outcome is Outcome.APPLIED
    assert served.service.evict(5) == 0


def test_who_is_evicted_before_it_has_come_does_not_come(served: Served) -> None:
    assert served.service.evict(2) == 0

    with pytest.raises(HandshakeError, match="rank 2 was taken out of the run"):
        served.come(2)


def test_the_end_of_a_worker_that_is_out_is_no_news(served: Served) -> None:
    first, second = served.come(1), served.come(2)
    served.service.evict(1)

    first.channel.close()
    second.channel.close()

    assert eventually(lambda: served.lost)
    assert [rank for rank, _ in served.lost] == [2]


@pytest.mark.parametrize("known", [None, RunFailure(0, "KeyboardInterrupt")])
def test_after_an_update_that_was_broken_off_the_run_ends_with_what_has_broken_it(
    monkeypatch: pytest.MonkeyPatch, known: RunFailure | None
) -> None:
    monkeypatch.setattr("lightning_async.runtime.failure._NEWS_TIMEOUT_S", 10.0 if known else 0.05)
    served = Served("shm")
    peer = served.come(1)
    ticket, version = peer.draw()[0], peer.pull()
    served.service.holder._whole.__enter__()

    waiting = peer.push(version, ticket)
    if known is not None:
        # Rank 0's own thread says so once its callbacks have been told.
        assert not eventually(lambda: served.latch.failure is not None, timeout_s=0.2)
        served.latch.trip(known)

    assert isinstance(waiting.ended(), ChannelClosedError)
    assert eventually(lambda: served.latch.failure is not None)
    failure = served.latch.failure
    assert failure is not None and (failure == known or "half updated" in failure.reason) and failure.rank == 0
    assert served.applied == []
    served.service.close()
    peer.channel.close()
    served.entrance.close()
    served.latch.free_reserve()
