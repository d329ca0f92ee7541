"""The ranks of one host that were forked or spawned from here: how long they are waited for, and whose fault an end is.

Rank 0's process says by its exit that the run is over. On another host none does: its ranks are lost and started again
one by one, the first like any other, until rank 0 says that the run is over, or is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.runtime.failure import RunFailure, WorkerFailedError, describe_exit
from lightning_async.runtime.handshake import Address, HandshakeError
from lightning_async.runtime.launcher_connection import LauncherConnection, Lost, say_on_host
from lightning_async.strategies import launching
from lightning_async.strategies.mailbox import Mailbox
from lightning_async.transport.base import ChannelClosedError

__all__ = ["HostProcesses"]

# Between two tries to reach rank 0 from a host that was cut off, and for each.
_TRY_S = 2.0
# For rank 0 to say what becomes of a rank, before training has begun.
_PATIENCE_S = 60.0
# A process that is dying has closed its connections before its status is known.
_DYING_S = 0.2


class HostProcesses:
    """The processes of a host's ranks.

    Args:
        processes: one for each rank of this host; what is started in the place of another one takes its place there.
        error_files: where torch leaves the traceback of each.
        host: which host this is, among those of the run.
        goes_on: whether a fit goes on without ranks that it loses.
        start: starts a rank of this host again; called with its number here and the address that it joins the run at.
    """

    def __init__(
        self,
        processes: list[Any],
        error_files: Sequence[str] = (),
        host: int = 0,
        goes_on: bool = False,
        start: Callable[[int, Address], Any] | None = None,
    ) -> None:
        self._processes = processes
        self._error_files = error_files
        self._host = host
        self._first_rank = host * len(processes)
        self._goes_on = goes_on
        self._start = start
        self._running = dict(enumerate(processes))
        self._ended: list[int] = []
        self._deadline = float("inf")
        self._result: Any = None
        # Where rank 0 says which ranks are lost, once training has begun.
        self._address: Address | None = None
        self._connection: LauncherConnection | None = None
        # Of each rank of this host: rank 0's last word on it, if it is lost; which start of it was the last.
        self._lost: dict[int, Lost] = {}
        self._starts = dict.fromkeys(self._running, 0)
        # Whether rank 0 has said its last, and that all was well; until when it is waited for on a host that is cut
        # off, and the next try.
        self._is_over = self._ends_well = False
        # Whether the first rank, or a process beside it, was killed or stopped when the run had ended: not an error.
        self.has_lost_first = False
        self._waits_until: float | None = None
        self._next_try = 0.0
        # When a lost one is started again; since when rank 0, which does so while it lives, has not said a word on one
        # that has ended with an error.
        self._due: dict[int, float] = {}
        self._undecided: dict[int, float] = {}

    def wait(self, mailbox: Mailbox) -> Any:
        """Waits until the run is over here.

        Args:
            mailbox: where the first rank says the address of rank 0, and the fit's result or why the run has failed.

        Returns:
            The first rank's result; None if that rank was lost and others have come to the end.

        Raises:
            WorkerFailedError: if a rank has failed, or all of this host are lost; they have ended then.
            SIGTERMException: if the ranks have left together after a SIGTERM.
        """
        try:
            while self._is_under_way() and time.monotonic() < self._deadline:
                self._sleep(mailbox)
                # What a process has said before its end is read by the time that its end counts.
                ended = [index for index, process in self._running.items() if not process.is_alive()]
                self._take_post(mailbox)
                self._listen()
                self._note_ends(ended)
                self._give_rank_0_up()
                self._start_due(mailbox)
            self._take_post(mailbox)
            return self._judge()
        finally:
            if self._connection is not None:
                self._connection.close()

    def _is_under_way(self) -> bool:
        return bool(self._running or self._due or self._is_awaited()) or self._may_come_back()

    def _is_awaited(self) -> bool:
        """Whether rank 0 may yet say that a rank is to be started again which has ended."""
        if self._connection is None or self._has_lost_rank_0 or not self._undecided:
            return False
        return time.monotonic() - max(self._undecided.values()) < launching.END_TIMEOUT_S

    def _may_come_back(self) -> bool:
        """Whether the ranks have ended since this host is cut off: rank 0, which goes on, may be heard of again."""
        if self._address is None or self._is_over or self._host == 0 or not self._has_lost_rank_0:
            return False
        now, patience_s = time.monotonic(), self._address.timeout_s
        if self._waits_until is None:
            self._waits_until = now + patience_s
            told = f"rank 0 cannot be reached; if it can within {patience_s:g} s, this host's ranks are started again"
            say_on_host(self._host, told)
        if self._connection is None and now >= self._next_try:
            self._next_try = now + _TRY_S
            self._connect(self._address)
        return now < self._waits_until and not self._is_over

    @property
    def _has_lost_rank_0(self) -> bool:
        return isinstance(self._result, RunFailure) and self._result.rank == 0

    def _sleep(self, mailbox: Mailbox) -> None:
        now = time.monotonic()
        waits_s = [launching.POLL_S, *(due_s - now for due_s in self._due.values())]
        awaited: list[Any] = [process.sentinel for process in self._running.values()]
        if self._connection is not None:
            awaited.append(self._connection)
        connection.wait([*awaited, mailbox.reader], timeout=max(0.0, min(waits_s)))

    def _take_post(self, mailbox: Mailbox) -> None:
        for value in mailbox.take():
            if isinstance(value, Address):
                if self._address is None:
                    self._address = value
                    self._connect(value)
            elif self._result is None:
                self._result = value

    # --- what rank 0 says --------------------------------------------------------------------------------------------

    def _connect(self, address: Address) -> None:
        ranks = [self._first_rank + index for index in range(len(self._processes))]
        again = self._waits_until is not None
        try:
            self._connection = LauncherConnection(address, ranks, self._host, patience_s=_TRY_S if again else None)
        except (HandshakeError, ChannelClosedError) as error:
            if not again or not _is_cut(error):
                self._is_over = True
                say_on_host(self._host, f"lost ranks of this host are not started again: {error}")

    def _listen(self) -> None:
        if self._connection is None:
            return
        try:
            self._connection.beat()
            waited_for: list[Any] = [self._connection]
            while connection.wait(waited_for, timeout=0.0):
                word = self._connection.receive()
                if word is None:
                    self._ends_well = True
                    self._hang_up()
                    return
                self._heed(word)
        except ChannelClosedError as error:
            # Rank 0 is gone, or the run has failed, or the host is cut off: ranks that live end by themselves.
            is_cut = _is_cut(error)
            self._hang_up(is_over=not is_cut)
            if not is_cut:
                self._end_soon()

    def _hang_up(self, is_over: bool = True) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._is_over |= is_over
        self._due.clear()
        self._undecided.clear()

    def _heed(self, word: Lost) -> None:
        """Ends what is left of a rank that is out of the run; it is started again later, if that is wanted."""
        index = word.rank - self._first_rank
        if self._lost.get(index) == word or 0 < word.start <= self._starts[index]:
            # Said again, to one that was away.
            return
        self._lost[index], self._waits_until = word, None
        self._undecided.pop(index, None)
        if word.leaves:
            return
        process = self._processes[index]
        process.join(_DYING_S)
        reason = word.describe_end(process.exitcode)
        if index in self._running:
            process.kill()
            process.join()
            del self._running[index]
        if self._host:
            say_on_host(self._host, f"rank {word.rank} is lost: {reason}; {word.told}")
        if word.start > self._starts[index]:
            self._due[index] = time.monotonic() + word.delay_s

    def _start_due(self, mailbox: Mailbox) -> None:
        now = time.monotonic()
        for index in [index for index, due_s in self._due.items() if due_s <= now]:
            del self._due[index]
            assert self._start is not None and self._address is not None
            if index == 0:
                # What it has said of its end, if anything, is not how the run ends.
                self._take_post(mailbox)
                self._result = None
            if os.path.exists(self._error_files[index]):
                os.unlink(self._error_files[index])
            self._processes[index] = self._running[index] = self._start(index, self._address)
            self._starts[index] = self._lost.pop(index).start

    # --- the ends of processes ---------------------------------------------------------------------------------------

    def _note_ends(self, ended: Sequence[int]) -> None:
        # Others of them are known by rank 0's word by now.
        for index in [index for index in ended if index in self._running]:
            process = self._running.pop(index)
            process.join()
            self._ended.append(index)
            if process.exitcode:
                self._undecided[index] = time.monotonic()
            if process.exitcode and self._connection is not None:
                self._connection.report(self._first_rank + index, process.exitcode, self._starts[index])
            if self._is_last_of_run(index, process.exitcode):
                self._due.clear()
                self._end_soon()

    def _give_rank_0_up(self) -> None:
        """Ends the wait for a rank 0 that is stopped: the others have ended for that, and it says nothing of it."""
        patience_s = _PATIENCE_S if self._address is None else self._address.timeout_s
        if self._host == 0 and 0 in self._running and self._undecided and not self._is_over:
            silent_s = time.monotonic() - min(self._undecided.values())
            if silent_s > max(patience_s, launching.END_TIMEOUT_S):
                self._end_soon()

    def _is_last_of_run(self, index: int, code: int) -> bool:
        """Whether the end of a process is the run's, on this host."""
        if not self._goes_on:
            return code != 0
        if index != 0:
            return False
        if self._host == 0 or self._address is None or self._is_over:
            return True
        # It may be lost, or have left; or it brings the fit's result.
        return code == 0 and self._result is not None

    def _end_soon(self) -> None:
        self._deadline = min(self._deadline, time.monotonic() + launching.END_TIMEOUT_S)

    # --- how it was --------------------------------------------------------------------------------------------------

    def _judge(self) -> Any:
        processes, result = self._processes, self._result
        stuck, told = sorted(self._running), isinstance(result, RunFailure)
        is_gone = (0 in stuck and not told) or _was_killed(processes[0].exitcode)
        self.has_lost_first = is_gone or (isinstance(result, RunFailure) and result.rank == 0 and result.lost)
        for process in self._running.values():
            process.kill()
        if self._goes_on and self._host == 0 and processes[0].exitcode == 0:
            # Rank 0 has come to the end without those that were lost, or were taken out and are only stopped.
            failed = told
        elif self._goes_on and (gone := self._gone()):
            # Of those that the run has gone on without, nothing counts.
            left = [index for index in range(len(processes)) if index not in gone]
            if not left and self._lost and all(word.leaves for word in self._lost.values()):
                raise SIGTERMException
            if not left and len(self._lost) == len(processes):
                raise WorkerFailedError(self._all_lost())
            if 0 in gone:
                result, told = None, False
            failed = told or any(index in stuck or processes[index].exitcode != 0 for index in left)
            if not failed and 0 in gone:
                return None
        else:
            failed = told or bool(stuck) or any(process.exitcode != 0 for process in processes)
        if failed:
            raise WorkerFailedError(self.failure(result if told else None, self._ended, stuck))
        if result is None:
            raise SIGTERMException
        return result

    def _gone(self) -> set[int]:
        """The ranks that have no part in the run's end: lost ones, and those that have come back too late to join."""
        late = [index for index, start in self._starts.items() if start and self._processes[index].exitcode]
        return {*self._lost, *late} if self._ends_well else {*self._lost}

    def _all_lost(self) -> RunFailure:
        word = [word for word in self._lost.values() if not word.leaves][-1]
        return RunFailure(word.rank, f"{word.reason}; the run goes on without this host, whose ranks are all lost")

    def failure(self, known: RunFailure | None, ended: list[int], stuck: list[int]) -> RunFailure:
        """What has ended the run.

        Args:
            known: what the first rank has said of it; None if it has not.
            ended: the processes that have ended, in that order.
            stuck: those that have not.
        """
        if known is not None and known.rank - self._first_rank not in range(len(self._processes)):
            # It was started on another host, where its exit status and its traceback are.
            return known
        index = self._culprit(ended, stuck) if known is None else known.rank - self._first_rank
        code = self._processes[index].exitcode or 0
        if known is not None and (index in stuck or code >= 0):
            reason = known.reason
        else:
            reason = "its process did not end" if index in stuck else describe_exit(code)
        traceback = _error_of(self._error_files[index])
        return RunFailure(self._first_rank + index, f"{reason}\n\n{traceback}" if traceback else reason)

    def _culprit(self, ended: list[int], stuck: list[int]) -> int:
        """The process that most likely began it, if rank 0 could not say: bystanders exit with code 1."""
        codes = {index: self._processes[index].exitcode or 0 for index in ended}
        by_signal = [index for index in ended if codes[index] < 0]
        with_error = [index for index in ended if os.path.exists(self._error_files[index])]
        with_code = [index for index in ended if codes[index] > 1]
        with_any = [index for index in ended if codes[index]]
        return [*by_signal, *with_error, *with_code, *stuck, *with_any][0]


def _was_killed(code: int | None) -> bool:
    # The other two ask a process to end.
    return code is not None and code < 0 and -code not in (signal.SIGTERM, signal.SIGINT)


def _is_cut(error: Exception) -> bool:
    """Whether a connection has ended since the other side cannot be reached, which may yet be there."""
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ConnectionError)


def _error_of(path: str) -> str:
    """The traceback that torch has written for a process that ended with an exception."""
    try:
        return str(pickle.loads(Path(path).read_bytes()))
    except FileNotFoundError:
        return ""
