"""What has started the ranks of each host, and starts them again as rank 0 says.

A *launcher* is the process that the ranks of a host were started from: the script's first process there, or the one
that has forked or spawned them. When training begins it connects to rank 0, where a lost rank's restarts are counted.
It is told which of its ranks are lost, ends what is left of them and starts them again; it tells how their processes
end, which is all that is seen of a rank that dies before it has joined.

A launcher counts the starts of a rank: 0 is the one that the run began with. Rank 0's word names the start that it
wants, so what comes late or twice is noticed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from lightning_async.runtime.alarms import Alarm
from lightning_async.runtime.evictions import Evictions
from lightning_async.runtime.failure import FailureLatch, RunFailure, describe_exit, say
from lightning_async.runtime.handshake import HandshakeError, PeerInfo
from lightning_async.runtime.launcher_connection import BEAT_S, ERROR, Lost, receive_values, send_values
from lightning_async.runtime.restart_counts import Restarts
from lightning_async.transport.base import ChannelClosedError
from lightning_async.transport.connection import ControlConnection
from lightning_async.transport.message import Welcome

__all__ = ["Launchers"]

log = logging.getLogger(__name__)

# A launcher that has said nothing for so long is on a host that may be cut off.
_SILENCE_S = 4 * BEAT_S
_CLOSING_S = 1.0
# Until a rank that is started again has reached rank 0: imports, on a slow disk and a busy machine.
_IMPORTS_S = 300.0
# How long a launcher's report of a process may trail the end of its connection.
_REPORT_S = 3.0
# Of a rank that is not started any more.
_NO_MORE = -1


@dataclass(eq=False)
class _Launcher:
    """What rank 0 knows of a launcher.

    Args:
        ranks: those that it has started.
        tell: takes word to it; raises ChannelClosedError if it is gone.
        where: what rank 0 adds to what it says of its ranks.
        unable: why it cannot start a rank again, in words; empty if it can.
        connection: to it; None of rank 0's own process.
    """

    ranks: frozenset[int]
    tell: Callable[[Lost], object]
    where: str = ""
    unable: str = ""
    connection: ControlConnection | None = None
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def is_silent(self) -> bool:
        """Whether it has said nothing for too long."""
        return self.connection is not None and time.monotonic() - self.heard_at > _SILENCE_S


class Launchers:
    """Rank 0's side: decides which lost ranks are started again, and has their launchers do it.

    Args:
        evictions: takes lost ranks out of the run.
        latch: the run's failure latch.
        most: how often in a row a rank may be started again.
        timeout_s: `worker_timeout`.

    Attributes:
        has_come: tells whether a rank has reached rank 0, and is watched over.
    """

    def __init__(self, evictions: Evictions, latch: FailureLatch, most: int, timeout_s: float = 60.0) -> None:
        self._evictions = evictions
        self._roster = evictions.roster
        self._latch = latch
        self._most = most
        self._timeout_s = timeout_s
        self.has_come: Callable[[int], bool] = lambda rank: False
        self._late: dict[int, Alarm] = {}
        self._restarts = Restarts()
        self._changed = threading.Condition()
        self._launchers: list[_Launcher] = []
        self._known: set[int] = set()
        # Of each rank that was lost: the start of it that is wanted, and the word of that.
        self._starts: dict[int, int] = {}
        self._words: dict[int, Lost] = {}
        self._sending = threading.Lock()
        self._closed = False

    def add_own(self, ranks: Collection[int], tell: Callable[[Lost], object], unable: str = "") -> None:
        """Rank 0's own process has started ranks.

        Args:
            ranks: which.
            tell: does what is wanted of a lost one.
            unable: why it cannot start a rank again, in words; empty if it can.
        """
        self._add(_Launcher(frozenset(ranks), tell, unable=unable))

    def take(self, peer: PeerInfo, connection: ControlConnection) -> None:
        """Serves a launcher, in the listener's thread for it, until it or the run is over.

        Raises:
            HandshakeError: if it does not say which ranks it has started.
        """
        ranks, unable, host = (peer.claims.get(name) for name in ("ranks", "unable", "host"))
        if not isinstance(ranks, list) or not all(isinstance(rank, int) for rank in ranks):
            raise HandshakeError(f"it has started ranks {ranks!r}")
        connection.send(Welcome(peer.rank))
        connection.settimeout(None)
        connection.survive_cuts(self._timeout_s)
        where = f" by host {host}" if host else ""
        launcher = _Launcher(
            frozenset(ranks), lambda lost: send_values(connection, *lost), where, str(unable or ""), connection
        )
        missed = self._add(launcher)
        try:
            for word in missed:
                self._tell(launcher, word)
                if word.start:
                    say(0, f"rank {word.rank}: {self._say_where(launcher, word)}")
            while True:
                report = receive_values(connection)
                launcher.heard_at = time.monotonic()
                if report:
                    self.hear(*report)
        except (ChannelClosedError, TypeError) as error:
            log.debug("the launcher of ranks %s is gone: %s", ranks, error)
        finally:
            connection.close()
            with self._changed:
                self._launchers.remove(launcher)
                self._changed.notify_all()

    def replace(self, failure: RunFailure) -> str | None:
        """Has a lost rank started again soon, if something can and it was not too often before.

        Args:
            failure: the rank, and what happened to it.

        Returns:
            What becomes of it, in words; None if that is not known.
        """
        rank = failure.rank
        with self._changed:
            launcher = next((one for one in reversed(self._launchers) if rank in one.ranks), None)
            word = self._words[rank] = self._decide(failure, launcher)
            self._starts[rank] = word.start or _NO_MORE
            self._changed.notify_all()
            if launcher is None:
                return "it is not started again: what has started it is gone" if rank in self._known else None
        self._tell(launcher, word)
        if word.start:
            self._expect(word)
        return self._say_where(launcher, word)

    def _expect(self, word: Lost) -> None:
        """Has another one started if this one does not come: its disk, say, gives no answer."""

        def look() -> None:
            if self._starts.get(word.rank) == word.start and not self.has_come(word.rank):
                self.lose_joiner(RunFailure(word.rank, f"has not reached rank 0 within {_IMPORTS_S:g} s"))

        if (before := self._late.get(word.rank)) is not None:
            before.close()
        alarm = self._late[word.rank] = Alarm(look)
        alarm.set(_IMPORTS_S + word.delay_s)

    def let_go(self, rank: int, reason: str) -> None:
        """A rank leaves by itself: it is not started again."""
        self._end(Lost(rank, reason, "it leaves by itself", leaves=True))

    def hear(self, rank: int, code: int, start: int) -> None:
        """A launcher tells how a process of its has ended; for any thread.

        Args:
            rank: the rank that it was.
            code: its exit status.
            start: which start of the rank it was.
        """
        reason = describe_exit(code)
        with self._evictions.deciding:
            if start != self._starts.get(rank, 0):
                # Of a rank that is known to be lost.
                return
            if rank not in self._roster:
                self._lose_before_it_was_in(rank, code, start)
                return
        # Outside, since the news of a rank may be waited for.
        if rank in self._roster:
            if code == ERROR and self._evictions.under_way:
                # It has most likely said itself what was wrong.
                self._evictions.lose_connection(rank, reason)
            else:
                self._evictions.lose(RunFailure(rank, reason))

    def lose_joiner(self, failure: RunFailure) -> None:
        """A rank gives no sign of life, or is gone, before it is in the run; for any thread.

        Its launcher tells in a moment how its process has ended. Where it does not, the process is stopped, or cannot
        be reached: it is ended, and another one started.
        """
        threading.Thread(target=self._replace_joiner, args=(failure,), name="lost-joiner", daemon=True).start()

    def _replace_joiner(self, failure: RunFailure) -> None:
        rank = failure.rank
        start = self._starts.get(rank, 0)
        with self._changed:
            self._changed.wait_for(lambda: self._starts.get(rank, 0) != start or self._closed, _REPORT_S)
        with self._evictions.deciding:
            is_known = self._starts.get(rank, 0) != start or start <= 0 or rank in self._roster
            if is_known or self._closed or self._latch.failure is not None:
                return
            told = self.replace(failure) or ""
        _say_lost(failure, told)

    def _lose_before_it_was_in(self, rank: int, code: int, start: int) -> None:
        failure = RunFailure(rank, describe_exit(code))
        if start == 0 or self._latch.failure is not None or self._closed:
            return
        if code == ERROR:
            told = "it is not started again: that was an error of its own"
            self._end(Lost(rank, failure.reason, told))
        else:
            told = self.replace(failure) or ""
        _say_lost(failure, told)

    def close(self) -> None:
        """The run is over: tells the launchers, unless it has failed; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            launchers, late = list(self._launchers), list(self._late.values())
        for alarm in late:
            alarm.close()
        for launcher in launchers:
            if launcher.connection is None:
                continue
            try:
                if self._latch.failure is None:
                    send_values(launcher.connection)
            except ChannelClosedError as error:
                log.debug("a launcher is gone: %s", error)
            launcher.connection.shutdown()
        with self._changed:
            self._changed.wait_for(lambda: all(one.connection is None for one in self._launchers), _CLOSING_S)

    def _add(self, launcher: _Launcher) -> list[Lost]:
        """Counts on a launcher from here on; returns what it has not been told."""
        with self._changed:
            self._launchers.append(launcher)
            self._known |= launcher.ranks
            words = [self._words[rank] for rank in sorted(launcher.ranks) if rank in self._words]
        return [word for word in words if word.rank not in self._roster]

    def _decide(self, failure: RunFailure, launcher: _Launcher | None) -> Lost:
        rank, reason = failure.rank, failure.reason
        if launcher is not None and launcher.unable:
            return Lost(rank, reason, launcher.unable)
        count, delay_s = self._restarts.count(rank)
        if count > self._most:
            return Lost(rank, reason, f"it is not started again (max_restarts={self._most})")
        later = f" in {delay_s:g} s" if delay_s else ""
        start = max(self._starts.get(rank, 0), 0) + 1
        return Lost(rank, reason, f"it is started again{later} ({count} of {self._most})", start, delay_s)

    def _end(self, word: Lost) -> None:
        """Has a rank started no more."""
        with self._changed:
            self._starts[word.rank] = _NO_MORE
            self._changed.notify_all()
            self._words[word.rank] = word
            launcher = next((one for one in reversed(self._launchers) if word.rank in one.ranks), None)
        if launcher is not None:
            self._tell(launcher, word)

    def _tell(self, launcher: _Launcher, word: Lost) -> None:
        try:
            with self._sending:
                launcher.tell(word)
        except ChannelClosedError as error:
            log.debug("the launcher of rank %d is gone: %s", word.rank, error)

    def _say_where(self, launcher: _Launcher, word: Lost) -> str:
        if not word.start:
            return word.told
        silent = ", once that is heard of again" if launcher.is_silent else ""
        return word.told.replace("started again", f"started again{launcher.where}", 1) + silent


def _say_lost(failure: RunFailure, told: str) -> None:
    say(0, f"rank {failure.rank}, which was about to join, is lost: {failure.reason}; {told}")
