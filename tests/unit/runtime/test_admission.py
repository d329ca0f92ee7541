"""A worker comes in between two meetings, at the segment whose state it has, and dies without harm at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lightning_async.runtime import admission
from lightning_async.runtime.admission import Admission, Admitted, Invitation, JoinRequest
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.handshake import JOIN, Address, HandshakeError, handshake
from lightning_async.runtime.meeting import send_object
from lightning_async.runtime.roster import Roster
from tests.harness import Call, Entrance, eventually

pytestmark = pytest.mark.timeout(30)
COUNTS = (7, 2)


class House:
    """Rank 0's entrance, and those that come to it."""

    def __init__(self) -> None:
        self.latch = FailureLatch()
        self.roster = Roster(range(3))
        self.entrance = Entrance(3, self.latch)
        self.admission = Admission(self.roster, self.latch, lambda: COUNTS)
        self.entrance.listener.on_join = self.admission.take
        self.address = self.entrance.listener.address
        self.admission.exchange = Address("127.0.0.1", 1, "exchange")
        self.told: list[tuple[str, int]] = []
        for name in ("let_in", "admit", "check"):
            setattr(self.admission, name, lambda rank, name=name: self.told.append((name, rank)))
        self.requests: list[JoinRequest] = []
        self.latches: list[FailureLatch] = []

    def knock(self, rank: int | None = 1) -> JoinRequest:
        self.latches.append(FailureLatch())
        request = JoinRequest(Invitation(self.address, rank), self.latches[-1])
        self.requests.append(request)
        return request

    def close(self) -> None:
        self.admission.close()
        for request in self.requests:
            request.close()
        self.entrance.close()
        for latch in (self.latch, *self.latches):
            latch.free_reserve()


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def test_a_lost_rank_comes_back_as_its_next_incarnation_and_is_told_where_the_others_are(house: House) -> None:
    house.roster.remove(1, "killed")
    house.admission.open(b"state of a segment")

    request = house.knock(1)
    segment, state = request.fetch_state() or (0, b"")
    admitted = request.come_in(segment)

    assert (request.rank, request.incarnation) == (1, 1)
    # The token is the run's, and is not sent.
    assert request.exchange == Address("127.0.0.1", 1, house.address.token)
    assert state == b"state of a segment"
    assert admitted == Admitted((0, 1, 2), COUNTS)
    assert house.told == [("let_in", 1), ("admit", 1), ("check", 1)]


def test_one_that_asks_for_no_rank_is_another_one(house: House) -> None:
    house.admission.open(b"")

    requests = [house.knock(None) for _ in range(2)]
    admitted = [request.come_in(1) for request in requests]

    assert [(request.rank, request.incarnation) for request in requests] == [(3, 0), (4, 0)]
    assert [each and each.ranks for each in admitted] == [(0, 1, 2, 3), (0, 1, 2, 3, 4)]


def test_it_waits_for_a_segment(house: House) -> None:
    fetching = Call(house.knock(None).fetch_state)
    assert fetching.waits()

    house.admission.open(b"next")

    assert fetching.outcome() == (1, b"next")


def test_nobody_comes_in_once_the_ranks_are_about_to_meet(house: House) -> None:
    house.admission.open(b"")
    request = house.knock(None)
    segment, _ = request.fetch_state() or (0, b"")

    house.admission.shut()

    assert request.come_in(segment) is None
    assert (house.roster.living, house.roster.generation) == ((0, 1, 2), 0)
    assert ("admit", 3) not in house.told


def test_whose_segment_has_ended_meanwhile_takes_over_the_next_one(house: House) -> None:
    house.admission.open(b"first")
    request = house.knock(None)
    first, _ = request.fetch_state() or (0, b"")
    house.admission.shut()
    house.admission.open(b"second")

    assert request.come_in(first) is None
    second, state = request.fetch_state() or (0, b"")
    admitted = request.come_in(second)

    assert (first, second, state) == (1, 2, b"second")
    assert admitted is not None and admitted.ranks == (0, 1, 2, 3)


def test_a_run_that_is_over_is_told_to_those_that_wait(house: House) -> None:
    fetching = Call(house.knock(None).fetch_state)
    assert fetching.waits()

    house.admission.close()

    assert fetching.outcome() is None


def test_a_run_that_fails_is_told_to_those_that_wait(house: House) -> None:
    fetching = Call(house.knock(None).fetch_state)
    assert fetching.waits()

    house.latch.trip(RunFailure(2, "ValueError: no"))

    assert fetching.outcome() is None


def test_one_that_dies_before_it_is_in_leaves_the_run_as_it_was(house: House) -> None:
    house.roster.remove(1, "killed")
    house.admission.open(b"")
    dying = house.knock(1)
    assert dying.fetch_state() is not None

    dying.close()
    again = house.knock(1)

    assert (again.rank, again.incarnation) == (1, 2)
    assert house.roster.living == (0, 2)
    assert ("admit", 1) not in house.told
    assert again.come_in(1) is not None


def test_one_that_dies_as_it_comes_in_is_looked_after(house: House) -> None:
    """Its heartbeat may have ended when it was not in yet, which was no loss then: so it is checked once it is in."""
    house.roster.remove(1, "killed")
    house.admission.check = lambda rank: house.roster.remove(rank, "its process is gone")
    house.admission.open(b"")
    dying = house.knock(1)
    send_object(dying._connection, ("come in", 1))
    dying.close()

    assert eventually(lambda: house.roster.generation == 3)
    assert house.roster.living == (0, 2)


def test_one_that_comes_back_before_its_loss_is_noticed_waits_for_that(house: House) -> None:
    house.admission.open(b"")
    again = Call(lambda: house.knock(1))

    assert again.waits()
    house.roster.remove(1, "its process is gone")

    assert again.ended() is None
    assert house.requests[0].incarnation == 1


@pytest.mark.parametrize(
    ("asked", "reason"),
    [(2, "rank 2 is in the run"), (0, "it wants to join as rank 0"), ("two", "it wants to join as rank 'two'")],
)
def test_who_cannot_be_what_it_asks_for_is_refused_by_name(
    house: House, asked: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_NOTICE_TIMEOUT_S", 0.1)
    house.admission.open(b"")
    with pytest.raises(HandshakeError, match=reason):
        handshake(house.address, 1, JOIN, joins_as=asked)
    assert house.told == []


def test_before_the_run_trains_there_is_nothing_to_join(house: House) -> None:
    house.admission.exchange = None

    with pytest.raises(HandshakeError, match="has not begun to train; try again in a moment"):
        house.knock(None)


def test_the_end_of_rank_0_is_an_error_that_says_what_it_was_about(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_async.runtime.failure._NEWS_TIMEOUT_S", 0.05)
    request = house.knock(None)
    request._connection.shutdown()

    with pytest.raises(WorkerFailedError, match="rank 0 failed: the run has ended while this rank was about to join"):
        request.fetch_state()


def test_an_invitation_travels_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Invitation.of_this_process() is None
    for rank in (None, 3):
        invitation = Invitation(Address("10.0.0.1", 4711, "secret"), rank)
        for name, value in invitation.variables().items():
            monkeypatch.setenv(name, value)
        assert Invitation.of_this_process() == invitation
