"""Pushes that wait at once: the reactor gives them to the holder together, and each worker is answered as ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lightning_async.exchange.fence import EvictedError
from lightning_async.exchange.reactor import Reactor
from lightning_async.exchange.session import SessionError
from lightning_async.holder import blocks
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.holder import Holder
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.transport.base import Buffers
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Abort, Outcome, Parameters, Pull, Read, Refuse
from lightning_async.transport.shm import SharedMemoryChannel
from tests.harness import Exchange, eventually, socket_pair

pytestmark = pytest.mark.timeout(30)

NUMEL = 200
KILLED = RunFailure(1, "its process was killed by SIGKILL")


class Served:
    """A reactor whose workers can be made to wait at once; ``joined`` is what the holder was given, push by push."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: int, slots: int = 1, bound: int | None = None) -> None:
        monkeypatch.setattr(blocks, "LARGE", 1)
        monkeypatch.setattr(blocks, "BLOCK", 64)
        self.exchange = Exchange([NUMEL], workers=workers, tickets=100, barrier=StalenessBarrier(bound))
        self.ended: dict[int, BaseException | None] = {}
        self.joined: list[int] = []
        push_together = Holder.push_together

        def note(holder: Holder, waiting: Any) -> Any:
            done = push_together(holder, waiting)
            self.joined.append(len(done))
            return done

        monkeypatch.setattr(Holder, "push_together", note)
        self.reactor = Reactor(
            self.exchange.holder, lambda session, error: self.ended.update({session.worker: error}), lambda error: None
        )
        self.ends: list[ControlConnection] = []
        self.sessions = []
        self.buffers: list[Buffers] = []
        for place in range(workers * slots):
            mine, accepted = socket_pair()
            theirs = ControlConnection(accepted)
            self.ends.append(ControlConnection(mine))
            self.ends[-1].settimeout(10.0)
            self.buffers.append(Buffers.allocate(NUMEL, torch.float32))
            session = self.exchange.session(
                place // slots, SharedMemoryChannel(theirs, self.buffers[-1]), place % slots
            )
            if place % slots:
                session.fence = self.sessions[-1].fence
            self.sessions.append(session)
            self.reactor.add(session, theirs)
        for place in range(workers * slots):
            self.ends[place].send(Pull(worker=place // slots))
            assert isinstance(self.ends[place].receive(), Parameters)
        # The first update makes the optimizer's state, by itself.
        self.push(0, version=0)
        self.answer(0)

    def push(self, place: int, version: int, **changes: Any) -> None:
        self.buffers[place].gradient.normal_(generator=torch.Generator().manual_seed(place))
        worker = self.sessions[place].worker
        self.ends[place].send(self.exchange.push(worker, version=version, **changes))

    def answer(self, place: int) -> Any:
        return self.ends[place].receive()

    @contextmanager
    def kept_busy(self) -> Iterator[None]:
        """The reactor's thread waits for the holder, and finds all that was sent meanwhile at once."""
        with self.exchange.holder._lock:
            self.ends[-1].send(Read(worker=self.sessions[-1].worker))
            # Nobody can see that a thread waits for a lock; a request of its that is gone from the socket says it.
            eventually(lambda: False, timeout_s=0.1)
            yield
        assert isinstance(self.answer(-1), Parameters)

    def close(self) -> None:
        self.reactor.close(0.2)
        for end in self.ends:
            end.close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    built = []

    def make(*arguments: Any, **more: Any) -> Served:
        built.append(Served(monkeypatch, *arguments, **more))
        return built[-1]

    yield make
    for served in built:
        served.close()


def test_pushes_that_wait_are_taken_together_and_each_worker_has_the_version_after_its_own(serve: Any) -> None:
    served = serve(4)
    with served.kept_busy():
        served.push(0, version=1)
        served.push(1, version=0)
        served.push(2, version=0)
    answers = [served.answer(place) for place in range(3)]

    assert served.joined == [3]
    assert [(answer.outcome, answer.version) for answer in answers] == [(Outcome.APPLIED, v) for v in (2, 3, 4)]
    assert [update.staleness for update in served.exchange.updates] == [0, 0, 2, 3]
    values = [served.buffers[place].parameters for place in range(3)]
    assert not any(one.equal(other) for one, other in ((values[0], values[1]), (values[1], values[2])))
    assert served.exchange.barrier.outstanding == {(0, 0): 2, (1, 0): 3, (2, 0): 4, (3, 0): 0}


def test_another_request_between_two_pushes_is_served_in_its_turn(serve: Any) -> None:
    served = serve(4)
    with served.kept_busy():
        served.push(0, version=1)
        served.push(1, version=0)
        served.ends[2].send(Read(worker=2))
    assert [served.answer(place).version for place in range(3)] == [2, 3, 3]


def test_both_slots_of_a_worker_may_wait(serve: Any) -> None:
    served = serve(2, slots=2)
    with served.kept_busy():
        served.push(0, version=1)
        served.push(1, version=0)
    assert [served.answer(place).version for place in range(2)] == [2, 3]
    assert served.joined == [2]


def test_what_the_barrier_holds_back_waits_and_goes_on_after_the_others(serve: Any) -> None:
    served = serve(3, bound=2)
    with served.kept_busy():
        # Applied now it would make the last of the others three updates stale.
        served.push(0, version=1)
        served.push(1, version=0)
    assert (served.answer(1).version, served.joined) == (2, [0])
    served.push(2, version=0)

    assert [served.answer(place).version for place in (2, 0)] == [3, 4]
    assert [update.staleness for update in served.exchange.updates] == [0, 1, 2, 2]


@pytest.mark.parametrize("how", ["evicted", "refused", "not finite"])
def test_what_becomes_of_one_is_its_own_affair(serve: Any, how: str) -> None:
    served = serve(4)
    with served.kept_busy():
        served.push(0, version=1)
        if how == "refused":
            served.push(1, version=7)
        else:
            served.push(1, version=0, finite=how != "not finite")
        if how == "evicted":
            # As `Server.evict` does.
            served.sessions[1].fence.close()
        served.push(2, version=0)

    assert served.answer(0).version == 2
    assert served.answer(2).version == 3
    assert len(served.exchange.updates) == (4 if how == "not finite" else 3)
    if how == "not finite":
        assert served.answer(1).outcome is Outcome.REJECTED
    else:
        assert eventually(lambda: 1 in served.ended)
        assert isinstance(served.ended[1], EvictedError if how == "evicted" else SessionError)
    if how == "refused":
        assert isinstance(served.answer(1), Refuse)


def test_a_failed_run_is_told_to_all_who_wait(serve: Any) -> None:
    served = serve(3)
    with served.kept_busy():
        served.push(0, version=1)
        served.push(1, version=0)
        tripping = threading.Thread(target=served.exchange.latch.trip, args=(KILLED,))
        tripping.start()
        eventually(lambda: served.exchange.latch.failure is not None)
    tripping.join(10.0)

    assert [type(served.answer(place)) for place in range(2)] == [Abort, Abort]
    assert eventually(lambda: len(served.ended) == 2)
    assert all(isinstance(error, WorkerFailedError) for error in served.ended.values())


def test_an_update_that_fails_ends_every_session_that_had_a_part_in_it(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(3)

    def fails(*_: Any) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr("lightning_async.holder.intake.GradientIntake.take_together", fails)
    with served.kept_busy():
        served.push(0, version=1)
        served.push(1, version=0)

    assert eventually(lambda: len(served.ended) == 2)
    assert all(isinstance(error, MemoryError) for error in served.ended.values())


def test_a_worker_that_does_not_wait_for_its_answer_is_refused_where_pushes_are_taken_together(serve: Any) -> None:
    served = serve(3)
    with served.kept_busy():
        served.push(1, version=0)
        served.push(0, version=1)
        served.push(0, version=1)

    assert served.answer(1).version == 2
    assert eventually(lambda: 0 in served.ended)
    assert isinstance(served.ended[0], SessionError)
