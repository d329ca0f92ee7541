"""Ranks meet by way of rank 0: all the living get the same, whoever is lost when, and nobody waits for the lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from lightning_async.runtime.collective_watch import _find_collective as find_collective
from lightning_async.runtime.evictions import Evictions
from lightning_async.runtime.failure import FailureLatch, RunFailure, WorkerFailedError
from lightning_async.runtime.meeting import Meeting, MeetingGuest, RanksLostError, receive_object
from lightning_async.runtime.meeting_host import MeetingHost
from lightning_async.runtime.roster import Roster
from lightning_async.runtime.threads import frame_of
from lightning_async.transport.connection import ControlConnection
from tests.harness import Call, eventually, socket_pair

pytestmark = pytest.mark.timeout(60)


class Lost(BaseException):
    """Ends the thread of a rank that the test has killed."""


class BrokenGroupError(RuntimeError):
    """What a raw collective raises when a rank of its group is gone."""


class Town:
    """Ranks as threads, which meet over sockets. A killed rank's connection ends, then rank 0 hears of it."""

    def __init__(self, ranks: int) -> None:
        self.roster = Roster(range(ranks))
        self.latch = FailureLatch()
        self.evictions = Evictions(self.roster, self.latch)
        self.evictions.under_way = True
        self.host = MeetingHost(self.roster, self.latch, self.evictions.lose_connection, "127.0.0.1")
        self.evictions.steps.append(lambda rank, reason: self.host.note_lost(rank))
        self.sides: dict[int, Meeting] = {0: self.host}
        self.latches = {0: self.latch}
        self.connections: dict[int, ControlConnection] = {}
        for rank in range(1, ranks):
            self.come(rank)

    def come(self, rank: int) -> None:
        theirs, mine = map(ControlConnection, socket_pair())
        if rank in self.sides:
            self.sides[rank].close()
        latch = self.latches[rank] = FailureLatch()
        # As the heartbeats do.
        self.latch.subscribe(latch.trip)
        guest = MeetingGuest(theirs, self.roster.living, latch, "127.0.0.1")
        guest.counts = self.host.counts
        self.sides[rank], self.connections[rank] = guest, theirs
        self.host.add(rank, mine)

    def kill(self, rank: int) -> None:
        """From outside of its thread."""
        self.latches[rank].trip(RunFailure(rank, "was taken out of the run"))
        self.connections[rank].shutdown()
        self.evictions.lose(RunFailure(rank, "killed"))

    def die(self, rank: int) -> None:
        """In its own thread."""
        self.kill(rank)
        raise Lost

    def run(self, part: Callable[[int, Meeting], Any]) -> dict[int, Call]:
        return {rank: Call(lambda rank=rank: part(rank, self.sides[rank])) for rank in self.sides}

    def outcomes(self, part: Callable[[int, Meeting], Any]) -> dict[int, Any]:
        """What the living ranks end with."""
        calls = self.run(part)
        for call in calls.values():
            call.join(30.0)
        assert not [rank for rank, call in calls.items() if call.is_alive()], "still waiting"
        return {rank: calls[rank].outcome() for rank in self.roster.living}

    def close(self) -> None:
        for side in self.sides.values():
            side.close()
        for latch in self.latches.values():
            latch.free_reserve()


@pytest.fixture
def town() -> Iterator[Callable[[int], Town]]:
    towns: list[Town] = []

    def build(ranks: int) -> Town:
        towns.append(Town(ranks))
        return towns[-1]

    yield build
    for each in towns:
        each.close()


Build = Callable[[int], Town]


def same(outcomes: dict[int, Any]) -> Any:
    """What all of them have ended with."""
    first, *others = outcomes.values()
    assert all(other == first for other in others), outcomes
    return first


# --- meetings ---------------------------------------------------------------------------------------------------------


def test_what_the_ranks_bring_comes_in_their_order(town: Build) -> None:
    three = town(3)

    found = three.outcomes(lambda rank, meeting: [meeting.gather(f"{rank}.{turn}", "turn") for turn in range(3)])

    assert same(found) == [[f"{rank}.{turn}" for rank in range(3)] for turn in range(3)]
    assert {(side.ranks, side.generation, side.counts) for side in three.sides.values()} == {((0, 1, 2), 0, (3, 0))}


def test_a_large_object_passes_whole(town: Build) -> None:
    blob = bytes(range(256)) * 8192

    assert same(town(2).outcomes(lambda rank, meeting: meeting.gather(blob, "blob"))) == [blob, blob]


def test_rank_0_alone_meets_itself(town: Build) -> None:
    assert town(1).host.gather("mine", "alone") == ["mine"]


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_rank_that_is_lost_before_a_meeting_ends_does_not_count(town: Build, when: str) -> None:
    three = town(3)
    came = threading.Event()

    def part(rank: int, meeting: Meeting) -> Any:
        if rank == 1:
            if when == "before":
                three.die(1)
            with suppress(WorkerFailedError):
                came.set()
                meeting.gather("lost", "meeting")
            raise Lost
        if rank == 2:
            came.wait(10.0)
            if when == "after":
                # Rank 0 has its object by now.
                assert eventually(lambda: not three.host._connections[1].is_readable())
            if when != "before":
                three.kill(1)
        return meeting.gather(rank, "meeting"), meeting.ranks, meeting.generation

    if when == "before":
        came.set()
    assert same(three.outcomes(part)) == ([0, 2], (0, 2), 1)


def test_a_rank_that_is_lost_in_the_middle_of_its_object_holds_nobody_up(town: Build) -> None:
    three = town(3)

    def part(rank: int, meeting: Meeting) -> Any:
        if rank == 1:
            # It announces more than it sends, and is stopped.
            three.connections[1].send_encoded((1000).to_bytes(8, "little") + b"abc")
            assert eventually(lambda: not three.host._connections[1].is_readable())
            three.evictions.lose(RunFailure(1, "gave no sign of life"))
            raise Lost
        return meeting.gather(rank, "meeting")

    assert same(three.outcomes(part)) == [0, 2]


def test_a_connection_that_ends_is_a_lost_rank(town: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.runtime.evictions._NEWS_TIMEOUT_S", 0.05)
    two = town(2)
    two.connections[1].shutdown()

    assert two.host.gather(0, "meeting") == [0]
    assert two.roster.lost == [(1, "connection closed")]


def test_a_rank_that_has_joined_meets_the_others(town: Build) -> None:
    three = town(3)
    three.outcomes(lambda rank, meeting: meeting.gather(rank, "first"))
    three.kill(1)
    gone = three.sides.pop(1)
    assert same(three.outcomes(lambda rank, meeting: meeting.gather(rank, "second"))) == [0, 2]
    three.roster.add(1)
    three.come(1)
    gone.close()
    three.roster.add(7)
    three.come(7)

    found = three.outcomes(lambda rank, meeting: (meeting.gather(rank, "third"), meeting.ranks, meeting.generation))

    assert same(found) == ([0, 1, 2, 7], (0, 1, 2, 7), 3)


def test_ranks_at_unlike_places_end_the_run_which_names_both(town: Build) -> None:
    calls = town(2).run(lambda rank, meeting: meeting.gather(rank, "barrier" if rank else "reduce"))

    for call in calls.values():
        error = call.ended()
        assert isinstance(error, WorkerFailedError)
        assert "rank 1 failed: it has come to 'barrier' (1) while rank 0 is at 'reduce' (1)" in str(error)
        assert "Call it on every rank" in str(error)


def test_guests_end_when_rank_0_is_gone(town: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.runtime.failure._NEWS_TIMEOUT_S", 0.05)
    three = town(3)
    calls = {rank: Call(lambda rank=rank: three.sides[rank].gather(rank, "meeting")) for rank in (1, 2)}
    assert all(call.waits() for call in calls.values())

    three.host.close()

    for call in calls.values():
        error = call.ended()
        assert isinstance(error, WorkerFailedError)
        assert "rank 0 failed: the meeting with it was broken off" in str(error)


def test_a_failure_of_the_run_ends_the_waiting_on_every_rank(town: Build) -> None:
    three = town(3)
    calls = {rank: Call(lambda rank=rank: three.sides[rank].gather(rank, "meeting")) for rank in (0, 1)}
    assert all(call.waits() for call in calls.values())

    three.latch.trip(RunFailure(2, "ValueError: no"))

    for call in calls.values():
        assert str(call.ended()) == "rank 2 failed: ValueError: no"


class LosesWhenAsked(Roster):
    """Loses a rank between two questions of the meeting's, as another thread may."""

    asked, at = 0, -1

    @property
    def living(self) -> tuple[int, ...]:
        living = super().living
        self.asked += 1
        if self.asked == self.at:
            self.remove(1, "killed")
        return living


@pytest.mark.parametrize("at", range(1, 8))
def test_a_loss_at_any_moment_leaves_a_meeting_that_is_of_one_piece(at: int) -> None:
    roster, latch = LosesWhenAsked(range(3)), FailureLatch()
    host = MeetingHost(roster, latch, lambda rank, reason: None, "127.0.0.1")
    sides, guests = {}, {}
    for rank in (1, 2):
        theirs, mine = map(ControlConnection, socket_pair())
        host.add(rank, mine)
        sides[rank] = MeetingGuest(theirs, (0, 1, 2), latch, "")
        guests[rank] = Call(lambda rank=rank: sides[rank].gather(rank, "one"))
    roster.asked, roster.at = 0, at

    found = host.gather(0, "one")

    assert found == [rank for rank in range(3) if rank in host.ranks]
    # A group of these ranks is up to date, or known not to be.
    if host.generation == roster.generation:
        assert host.ranks == roster.living
    assert guests[2].outcome() == found
    for side in (host, *sides.values()):
        side.close()
    latch.free_reserve()


# --- sections ---------------------------------------------------------------------------------------------------------


class Section:
    """One rank's way through a section: what it has gathered in each attempt."""

    def __init__(self, rank: int, meeting: Meeting, body: Callable[[int, Meeting, int], Any]) -> None:
        self.attempts: list[Any] = []
        self.restored = 0

        def attempt() -> None:
            assert meeting.in_section
            self.attempts.append(None)
            self.attempts[-1] = body(rank, meeting, len(self.attempts))

        meeting.repeat_until_whole(attempt, self._restore, lambda error: isinstance(error, BrokenGroupError))
        assert not meeting.in_section

    def _restore(self) -> None:
        self.restored += 1

    @property
    def outcome(self) -> tuple[Any, int]:
        assert self.restored == len(self.attempts) - 1
        return self.attempts[-1], len(self.attempts)


def sections(where: Town, body: Callable[[int, Meeting, int], Any]) -> dict[int, tuple[Any, int]]:
    return where.outcomes(lambda rank, meeting: Section(rank, meeting, body).outcome)


def test_a_section_without_a_loss_runs_once(town: Build) -> None:
    found = sections(town(3), lambda rank, meeting, attempt: [meeting.gather(rank, "in it") for _ in range(2)])

    assert same(found) == ([[0, 1, 2]] * 2, 1)


@pytest.mark.parametrize("at", range(4))
def test_a_loss_in_a_section_repeats_it_on_all_that_are_left(town: Build, at: int) -> None:
    three = town(3)

    def body(rank: int, meeting: Meeting, attempt: int) -> Any:
        gathered = []
        for turn in range(3):
            if rank == 1 and turn == at:
                three.die(1)
            gathered.append(meeting.gather(rank, "in it"))
        if rank == 1:
            # After the last collective, with the end of the section yet to come.
            three.die(1)
        return gathered

    assert same(sections(three, body)) == ([[0, 2]] * 3, 2)


def test_a_rank_that_was_lost_since_the_last_meeting_has_no_part_in_what_a_section_begins_with(town: Build) -> None:
    three = town(3)
    three.outcomes(lambda rank, meeting: meeting.gather(rank, "before"))
    three.kill(2)

    found = sections(three, lambda rank, meeting, attempt: meeting.gather(rank, "in it"))

    assert same(found) == ([0, 1], 2)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_rank_whose_raw_collective_fails_takes_the_others_along(town: Build, failing: int) -> None:
    """Some come out of a collective that a lost rank has broken for others: they are at other meetings by then."""
    four = town(4)

    def body(rank: int, meeting: Meeting, attempt: int) -> Any:
        if rank == 3:
            four.die(3)
        if attempt == 1 and rank == failing:
            assert eventually(lambda: 3 not in four.roster)
            raise BrokenGroupError
        return [meeting.gather(rank, f"turn {turn}") for turn in range(3)]

    assert same(sections(four, body)) == ([[0, 1, 2]] * 3, 2)


def test_losses_in_repetitions_repeat_again_until_one_is_whole(town: Build) -> None:
    four = town(4)

    def body(rank: int, meeting: Meeting, attempt: int) -> Any:
        first = meeting.gather(rank, "first")
        if rank == 4 - attempt and rank > 1:
            four.die(rank)
        return first, meeting.gather(rank, "second")

    assert same(sections(four, body)) == (([0, 1], [0, 1]), 3)


def test_restoring_may_meet(town: Build) -> None:
    three = town(3)
    met: dict[int, Any] = {}

    def part(rank: int, meeting: Meeting) -> Any:
        def body() -> None:
            if rank == 1:
                three.die(1)
            meeting.gather(rank, "in it")

        def restore() -> None:
            met[rank] = meeting.gather(rank, "restoring")

        meeting.repeat_until_whole(body, restore, lambda error: False)
        return meeting.gather(rank, "after it")

    assert same(three.outcomes(part)) == [0, 2]
    assert met == {0: [0, 2], 2: [0, 2]}


def test_an_error_of_the_sections_own_is_no_loss(town: Build) -> None:
    alone = town(1)

    def body() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        alone.host.repeat_until_whole(body, lambda: None, lambda error: False)

    assert not alone.host.in_section
    assert alone.host.gather("mine", "after it") == ["mine"]


@pytest.mark.parametrize("extra", [0, 1])
def test_a_collective_that_only_some_ranks_call_in_a_section_is_not_repeated_for_ever(town: Build, extra: int) -> None:
    two = town(2)

    def body(rank: int, meeting: Meeting, attempt: int) -> Any:
        assert attempt < 10
        if rank == extra:
            meeting.gather(rank, "barrier, called by user code")

    calls = two.run(lambda rank, meeting: Section(rank, meeting, body).outcome)

    for call in calls.values():
        error = call.ended()
        assert isinstance(error, WorkerFailedError)
        assert "rank 1 failed: it has come to " in str(error)
        assert "'barrier, called by user code'" in str(error) and "'the end of a section'" in str(error)


def test_a_section_that_fails_on_without_a_loss_ends_the_run(town: Build) -> None:
    two = town(2)

    def body(rank: int, meeting: Meeting, attempt: int) -> Any:
        assert attempt < 10
        raise BrokenGroupError

    for call in two.run(lambda rank, meeting: Section(rank, meeting, body).outcome).values():
        assert "could not be finished twice in a row, though no rank was lost" in str(call.ended())


# --- under stress -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_losses_leave_all_the_living_with_the_same(town: Build, seed: int) -> None:
    check_random_losses(town, seed, ranks=5)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2000))
def test_random_losses_in_many_more_runs(town: Build, seed: int) -> None:
    check_random_losses(town, 1000 + seed, ranks=2 + seed % 6)


def check_random_losses(town: Build, seed: int, ranks: int) -> None:
    """Meetings and sections, in which ranks die before, in and after what they do, or are killed from outside."""
    place = town(ranks)
    plan = random.Random(seed)
    mortal = plan.sample(range(1, ranks), plan.randint(1, ranks - 1))
    dies_at = {rank: plan.randint(0, 25) for rank in mortal}
    outside = {rank for rank in mortal if plan.random() < 0.4}
    shape = [(plan.random() < 0.5, plan.randint(0, 3)) for _ in range(6)]

    def part(rank: int, meeting: Meeting) -> Any:
        steps = 0
        trace: list[Any] = []

        def step() -> None:
            nonlocal steps
            if dies_at.get(rank) == steps:
                if rank in outside:
                    threading.Thread(target=place.kill, args=(rank,), daemon=True).start()
                else:
                    place.die(rank)
            steps += 1

        def meet(name: str) -> Any:
            step()
            return tuple(meeting.gather(rank, name))

        for is_section, length in shape:
            found: list[Any] = []

            def body(found: list[Any] = found, length: int = length) -> None:
                found.clear()
                known = len(place.roster.lost)
                for turn in range(length):
                    step()
                    # A raw collective, which fails for some of the ranks where one is gone.
                    if len(place.roster.lost) > known and turn % 2 == rank % 2:
                        raise BrokenGroupError
                    found.append(meet(f"turn {turn}"))

            if is_section:
                meeting.repeat_until_whole(body, lambda: None, lambda error: isinstance(error, BrokenGroupError))
                # Of one piece: the same ranks from its beginning to its end.
                assert len(set(found)) <= 1
            else:
                found += [meet(f"turn {turn}") for turn in range(length)]
            trace.append((found, meeting.ranks))
        return trace

    def guarded(rank: int, meeting: Meeting) -> Any:
        try:
            return part(rank, meeting)
        except (WorkerFailedError, RanksLostError):
            # Its connection was cut from outside.
            assert rank in outside
            raise Lost from None

    found = place.outcomes(guarded)
    assert place.latch.failure is None
    same(found)
    assert {*range(ranks)} - {*place.roster.living} <= {*mortal}


def test_an_object_is_received_as_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.runtime.failure._NEWS_TIMEOUT_S", 0.05)
    theirs, mine = map(ControlConnection, socket_pair())
    latch = FailureLatch()
    sender = Call(lambda: MeetingGuest(theirs, (0, 1), latch, "").gather({"a": [1, None]}, "named"))

    assert receive_object(mine) == ((0, 0, 1, "named"), {"a": [1, None]})

    mine.close()
    assert isinstance(sender.ended(), WorkerFailedError)
    theirs.close()
    latch.free_reserve()


@pytest.mark.parametrize("waits", [0, 1], ids=["host", "guest"])
def test_a_rank_that_waits_in_a_meeting_is_seen_there(town: Build, waits: int) -> None:
    """`collective_watch.py` knows a meeting by its module's name."""
    two = town(2)

    waiting = Call(lambda: two.sides[waits].gather("mine", "turn"))

    assert eventually(lambda: find_collective(frame_of(waiting.ident)) is not None)
    two.sides[1 - waits].gather("theirs", "turn")
    assert waiting.outcome() == (["mine", "theirs"] if waits == 0 else ["theirs", "mine"])
