"""Who takes part in a run, from a process's launch to its end, and what a failure means in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from lightning_async.runtime.admission import Admission, Invitation, JoinRequest
from lightning_async.runtime.collective_watch import CollectiveWatch
from lightning_async.runtime.elastic import forget_failure, is_supervised, record_failure
from lightning_async.runtime.evictions import Evictions
from lightning_async.runtime.failure import (
    ExitGuard,
    FailureLatch,
    RunFailure,
    WorkerFailedError,
    describe_error,
    describe_exit,
    say,
)
from lightning_async.runtime.handshake import HEARTBEAT, MEETING, Address, handshake
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.runtime.launchers import Launchers
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.losses import Losses, may_be_lost_peer
from lightning_async.runtime.meeting import Meeting, MeetingGuest
from lightning_async.runtime.meeting_host import MeetingHost
from lightning_async.runtime.outward import outward_address
from lightning_async.runtime.process_groups import break_groups
from lightning_async.runtime.process_identity import ProcessIdentity
from lightning_async.runtime.rendezvous import LOOPBACK, share_address
from lightning_async.runtime.roster import Resilience, Roster
from lightning_async.runtime.shutdown import note_failed_run

__all__ = ["Membership"]

# What watches over the ranks (torchrun, say) takes the first that exits for the culprit: the rank at fault or, on
# rank 0's host, rank 0, which says who it was. Under torchrun the others wait for twice as long.
_SURVIVOR_DELAY_S = 2.0
_GRACE_S = 5.0
# How much later than this one rank 0 may come to the same failure.
_COMMON_FAILURE_S = 1.0
_LOOK_S = 0.05


class Membership:
    """One process's membership in a run.

    Args:
        rank: this rank.
        worker_timeout_s: seconds without a sign of life after which a rank counts as lost.
        describe_end: asked how a rank's process ended, on rank 0.
        graceful: exception types with which all ranks leave together; they are no failure.
        exit_process: see `ExitGuard`.
        has_stepped: whether this rank has trained on a batch: a mistake that all ranks make comes before.
        is_told_to_end: whether this process has had a SIGTERM: what watches over the ranks has seen the failure then.
        is_judged_last: whether what has started the ranks finds the culprit when all have ended, in whatever order.
        is_owned: whether an engine owns the process and takes an error of each rank: all of them raise the failure
            then, and ``exit_process`` tells the engine of it where this rank's thread does not come back to.

    Attributes:
        rank: this rank.
        latch: the run's failure latch.
        listener: rank 0's listener, once the ranks have met; None elsewhere.
        address: where that is.
        meeting: where the ranks meet, if the run goes on without those that it loses; None otherwise.
        evictions: rank 0's decisions then; None elsewhere.
        admission: takes in ranks that join, on rank 0; None elsewhere.
        launchers: has lost ranks started again, on rank 0; None elsewhere.
        joining: the request of a rank that joins a run that is under way; None of others.
        losses: the ranks that the run has gone on without.
    """

    def __init__(
        self,
        rank: int,
        worker_timeout_s: float,
        describe_end: Callable[[int], str | None] = lambda rank: None,
        graceful: tuple[type[BaseException], ...] = (),
        exit_process: Callable[[int], object] = os._exit,
        has_stepped: Callable[[], bool] = lambda: False,
        is_owned: bool = False,
        is_told_to_end: Callable[[], bool] = lambda: False,
        is_judged_last: bool = False,
    ) -> None:
        self.rank = rank
        self.meeting: Meeting | None = None
        self.evictions: Evictions | None = None
        self.admission: Admission | None = None
        self.launchers: Launchers | None = None
        self.joining: JoinRequest | None = None
        self._resilience = Resilience()
        self._incarnation = 0
        self._has_left = self._was_taken_out = False
        self.losses = Losses()
        self.latch = FailureLatch()
        self.listener: Listener | None = None
        self.address: Address | None = None
        self._unexplained = RunFailure(rank, "an error that could not be described: out of memory", announced=True)
        # What a failed run in this process has left, and this one has outlived.
        forget_failure()
        self._is_owned = is_owned
        # Whether what watches over the ranks takes the first error for the cause.
        patient = is_owned or (is_supervised() and rank > 0)
        self._delay_s = 0.0 if is_judged_last else _SURVIVOR_DELAY_S * (2 if patient else 1)
        self._guard = ExitGuard(
            rank,
            self.latch,
            _GRACE_S + (1.0 if patient else 0.0),
            exit_process,
            before_exit=lambda failure: record_failure(rank, failure),
            ending="this rank's thread does not come back to say so" if is_owned else "ending this process",
        )
        if is_owned:
            self.latch.subscribe(self._wake)
        self._heartbeats: Heartbeats | None = None
        self._worker_timeout_s = worker_timeout_s
        self._describe_end = describe_end
        self._graceful = graceful
        self._has_stepped = has_stepped
        self._is_told_to_end = is_told_to_end

    def _wake(self, failure: RunFailure) -> None:
        """Ends this rank's collectives, so that its thread comes back and raises the failure."""
        if failure.rank != self.rank:
            break_groups()

    def _may_be_common(self, error: BaseException) -> bool:
        return isinstance(error, Exception) and not isinstance(error, MemoryError) and not self._has_stepped()

    def meet(
        self,
        world_size: int,
        main_address: str,
        broadcast: Callable[[str], str],
        gather: Callable[[str], list[str]],
        resilience: Resilience | None = None,
    ) -> None:
        """Opens rank 0's listener and ties every other rank's heartbeat to it; a collective call.

        Args:
            world_size: number of ranks; nothing is opened for one.
            main_address: what ranks on other hosts reach rank 0's by.
            broadcast: gives every rank rank 0's string.
            gather: gives every rank each rank's string.
            resilience: what becomes of the run when a rank is lost; it ends by default.
        """
        self._resilience = resilience or Resilience()
        if world_size == 1 or self._heartbeats is not None:
            return
        if self.rank == 0 and self._resilience.goes_on:
            self._host_meetings(world_size)
        evictions = self.evictions
        everyone = tuple(range(world_size))

        def ranks() -> tuple[int, ...]:
            return everyone if evictions is None else evictions.roster.living

        watch = CollectiveWatch(self.rank, ranks, self._worker_timeout_s)
        heartbeats = self._heartbeats = Heartbeats(
            self.rank,
            self.latch,
            self._worker_timeout_s,
            self._describe_end,
            watch=watch,
            on_lost=None if evictions is None else evictions.lose_peer,
            on_left=None if evictions is None else evictions.let_go,
            on_failed=None if evictions is None else evictions.fail,
            on_evicted=self._hear_of,
        )

        def listen(host: str) -> Address:
            if self._resilience.join_file is not None and host == LOOPBACK:
                # For workers on other machines.
                host = outward_address()
            listener = self.listener = Listener(host, world_size, heartbeats, self._worker_timeout_s)
            if isinstance(host_side := self.meeting, MeetingHost) and self.admission is not None:
                host_side.host, self.admission.expect = host, listener.expect
                listener.on_meeting, listener.on_join = host_side.take, self.admission.take
                listener.on_launcher = None if self.launchers is None else self.launchers.take
            return listener.address

        self.address = share_address(self.rank, main_address, listen, broadcast, gather)
        if self.rank == 0:
            return
        self._heartbeats.add(0, handshake(self.address, self.rank, HEARTBEAT)[0])
        if self._resilience.goes_on:
            connection, _ = handshake(self.address, self.rank, MEETING, **ProcessIdentity.of_this_process().as_claims())
            self.meeting = MeetingGuest(connection, tuple(range(world_size)), self.latch, self.address.host)

    def join(self, invitation: Invitation) -> JoinRequest:
        """Begins to join a run that is under way: from here on rank 0 watches over this rank.

        Raises:
            HandshakeError: if rank 0 refuses, with its reason.
            ChannelClosedError: if rank 0 cannot be reached.
        """
        self._resilience = Resilience("continue")
        request = self.joining = JoinRequest(invitation, self.latch)
        self.rank, self.address, self._incarnation = request.rank, invitation.address, request.incarnation
        self._heartbeats = Heartbeats(
            self.rank, self.latch, self._worker_timeout_s, self._describe_end, on_evicted=self._hear_of
        )
        connection, _ = handshake(self.address, self.rank, HEARTBEAT, request.incarnation)
        self._heartbeats.add(0, connection)
        return request

    def come_in(self, segment: int) -> bool:
        """Takes part in a segment, and in the meetings after it; False if the segment has ended.

        Args:
            segment: the one whose state this rank has taken over.
        """
        request = self.joining
        assert request is not None and self.address is not None
        if (admitted := request.come_in(segment)) is None:
            return False
        claims = ProcessIdentity.of_this_process().as_claims()
        connection, _ = handshake(self.address, self.rank, MEETING, request.incarnation, **claims)
        guest = self.meeting = MeetingGuest(connection, admitted.ranks, self.latch, self.address.host)
        guest.counts = admitted.counts
        self.joining = None
        return True

    def leave(self, reason: str) -> None:
        """Tells rank 0 that this rank leaves the run, which goes on without it; what ends it now is no failure.

        Args:
            reason: why, in words.
        """
        assert self._heartbeats is not None
        self._heartbeats.say_that_it_leaves(reason)
        self._has_left = True

    def lose(self, rank: int, code: int, start: int = 0) -> None:
        """The process of a rank that was started from here has ended; see `Launchers.hear`."""
        if self.launchers is not None:
            self.launchers.hear(rank, code, start)
        elif self.rank == 0 or not self._resilience.goes_on or self.meeting is None:
            self.latch.trip(RunFailure(rank, describe_exit(code)))
        # Else rank 0 sees it, too, and decides.

    @property
    def is_out(self) -> bool:
        """Whether this rank has left a run, or was taken out of it, that goes on without it."""
        return self._has_left or self._was_taken_out

    @property
    def incarnation(self) -> int:
        """How many workers of this rank came before."""
        return self._incarnation

    def _host_meetings(self, world_size: int) -> None:
        roster = Roster(range(world_size), self._resilience.min_ranks)
        evictions = self.evictions = Evictions(roster, self.latch)
        host = self.meeting = MeetingHost(roster, self.latch, evictions.lose_connection)

        def tell(rank: int, reason: str) -> None:
            host.note_lost(rank, ends=evictions.lets_go)
            if evictions.lets_go:
                launchers.let_go(rank, reason)
            self._hear_of(RunFailure(rank, reason))
            if self._heartbeats is not None:
                self._heartbeats.evict(rank, reason)

        most = self._resilience.max_restarts
        launchers = self.launchers = Launchers(evictions, self.latch, most, self._worker_timeout_s)
        evictions.steps.append(tell)
        evictions.restart = launchers.replace
        evictions.lose_joiner = launchers.lose_joiner
        admission = self.admission = Admission(roster, self.latch, lambda: host.counts)

        def has_come(rank: int) -> bool:
            return self._heartbeats is not None and self._heartbeats.watches(rank)

        def check(rank: int) -> None:
            if self._heartbeats is not None and not has_come(rank):
                evictions.lose(RunFailure(rank, "its process is gone: it ended while it joined"))

        admission.check, launchers.has_come = check, has_come

    def _hear_of(self, failure: RunFailure) -> None:
        """Another rank was taken out of the run, or this one."""
        if failure.rank == self.rank:
            self._was_taken_out = True
            reason = f"was taken out of the run, which goes on without it: {failure.reason}"
            self.latch.trip(RunFailure(self.rank, reason))
            return
        self.losses.hear_of(failure)

    def share(self, address: str, broadcast: Callable[[str], str]) -> str:
        """Gives every rank the address of another listener of this run, as JSON; a collective call.

        The token is the run's, which every rank has: it is not told again.

        Args:
            address: rank 0's; empty if there is none.
            broadcast: gives every rank rank 0's string.
        """
        found = broadcast(Address.from_json(address).without_token().as_json() if address else "")
        if not found or self.address is None:
            return found
        return replace(Address.from_json(found), token=self.address.token).as_json()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Runs this rank's part; turns its error into everyone's end, and another rank's end into this one's error."""
        try:
            yield
        except BaseException as error:
            # There may be no memory left even to say so.
            self.latch.free_reserve()
            explained = self._explain_somehow(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            self._leave()

    def _leave(self) -> None:
        with ExitStack() as steps:
            # Each is done, whatever becomes of the others; the last comes first.
            if self.rank == 0 or self._is_owned or self.latch.failure is None:
                # The error is on its way up to the user's code, which may want to save something, or to the owner.
                steps.callback(self._guard.disarm)
            if self.latch.failure is not None:
                note_failed_run()
            for part in (self.meeting, self.admission, self.launchers, self.joining):
                if part is not None:
                    steps.callback(part.close)
            if self._heartbeats is not None:
                steps.callback(self._heartbeats.close)
            if self.listener is not None:
                steps.callback(self.listener.close)
            self.latch.free_reserve()

    def _let_the_first_be_seen(self) -> None:
        """Leaves it to the rank at fault to end first: what watches over the ranks takes the first for the cause."""
        until = time.monotonic() + self._delay_s
        while time.monotonic() < until and not self._is_told_to_end():
            time.sleep(_LOOK_S)

    def _explain_somehow(self, error: BaseException) -> BaseException:
        try:
            return self._explain(error)
        except Exception:
            # No memory, for instance. What is told was made when there was some.
            self.latch.trip(self._unexplained)
            return error

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, self._graceful) or self._has_left:
            return error
        if isinstance(error, SystemExit) and self.joining is not None:
            # The run was over before this rank has come to it.
            return error
        if isinstance(error, KeyboardInterrupt):
            # Ctrl+C reaches every rank, and is each one's own reason to end.
            self.latch.trip(RunFailure(self.rank, describe_error(error), announced=True))
            return error
        if isinstance(error, WorkerFailedError):
            self.latch.trip(error.failure)
        failure = self.latch.failure
        if failure is None and self.rank > 0 and self._heartbeats is not None and self._may_be_common(error):
            # A mistake that all ranks make is told by rank 0.
            common = self.latch.wait(_COMMON_FAILURE_S)
            failure = common if common is not None and common.reason == describe_error(error) else None
        if failure is None and may_be_lost_peer(error) and (failure := self.losses.end_of_run(self.rank)) is not None:
            self.latch.trip(failure)
        if failure is None and may_be_lost_peer(error):
            failure = self.latch.explain_loss(lambda: RunFailure(self.rank, describe_error(error), announced=True))
        if failure is None or failure.rank == self.rank:
            failure = RunFailure(self.rank, describe_error(error), announced=True)
            self.latch.trip(failure)
            record_failure(self.rank, failure, error)
            return error
        if self.rank == 0 or self._is_owned:
            if failure.announced or not self._is_owned:
                self._let_the_first_be_seen()
            record_failure(self.rank, failure)
            return error if isinstance(error, WorkerFailedError) else WorkerFailedError(failure)
        if not failure.announced:
            say(self.rank, str(failure))
        if failure.announced or is_supervised():
            self._let_the_first_be_seen()
        record_failure(self.rank, failure)
        # Rank 0, or the rank at fault, tells the user; a traceback from every rank would bury it.
        return SystemExit(1)
