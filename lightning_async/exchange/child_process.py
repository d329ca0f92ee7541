"""A process of this package's own beside rank 0: started, listened to, watched over, ended."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from lightning_async.exchange.forked import ForkedProcess
from lightning_async.policies.base import StalenessPolicy
from lightning_async.runtime.alarms import Alarm
from lightning_async.runtime.failure import FailureLatch, describe_exit
from lightning_async.runtime.heartbeat import Heartbeats
from lightning_async.transport.connection import ControlConnection

__all__ = ["APART", "READY", "START_TIMEOUT_S", "ChildProcess", "check_policy_can_travel"]

log = logging.getLogger(__name__)

# An interpreter that imports torch, on a slow disk and a busy machine.
START_TIMEOUT_S = 300.0
# What asks for the whole holder in a process of its own, and the way out.
APART = ('holder="process"', 'take holder="thread"')
# What the process says first.
READY = "ready"
_END_TIMEOUT_S = 5.0
# Between a failure and its end, so that it can still tell its workers.
_GRACE_S = 1.0
# What a terminal or a job scheduler sends to every process is rank 0's to answer.
_RANK_0S_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Its own main module is none that a user's script could be run by. Before its imports, which take seconds, it has the
# kernel kill it when the thread that started it ends, even if it is stopped then (PR_SET_PDEATHSIG of linux/prctl.h).
# The end of the connection would not do: a process that rank 0 has forked has its end of it too. Then it takes a name
# (PR_SET_NAME).
_BOOT = """
import ctypes, json, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != int(sys.argv[4]):
    os._exit(1)
libc.prctl(15, b"{name}", 0, 0, 0)
sys.path[:] = json.loads(sys.argv[1])
from {module} import main
main(*map(int, sys.argv[2:4]))
"""


class ChildProcess:
    """Runs ``main(control, heartbeat)`` of a module; both are file descriptors of sockets.

    It begins to import when this is made, and ends with `end` or with this process, however that ends. That it ends or
    stops by itself is a failure of the rank that has started it, once it is watched over.

    Args:
        module: which module.
        name: what it is called in messages, "its holder process".
        on_message: called in the reader's thread with each message but the first; must not raise.
        on_gone: called in the reader's thread when there are no more.
        rank: the rank that starts it, whose failure its end is.
        forks: whether it is a fork of this process, which has imported everything, and not a new interpreter.
    """

    def __init__(
        self,
        module: str,
        name: str,
        on_message: Callable[[Any], None],
        on_gone: Callable[[], None] = lambda: None,
        rank: int = 0,
        forks: bool = False,
    ) -> None:
        self.name = name
        self._rank = rank
        self._on_message, self._on_gone = on_message, on_gone
        self._latch: FailureLatch | None = None
        self._heartbeats: Heartbeats | None = None
        self._ready = threading.Event()
        self._gone = threading.Event()
        self._ended = False
        self._ends_itself = False
        mine, theirs = socket.socketpair()
        self._my_heartbeat, their_heartbeat = socket.socketpair()
        descriptors = (theirs.fileno(), their_heartbeat.fileno())
        # The mask is inherited, so no moment is left in which such a signal would end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _RANK_0S_SIGNALS)
        try:
            self._process = ForkedProcess(module, descriptors) if forks else _interpreter(module, descriptors)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            their_heartbeat.close()
        self._killing = Alarm(self._process.kill)
        self._connection = Connection(mine.detach())
        self._reader = threading.Thread(target=self._read, name="child-news", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """Whether it says nothing more."""
        return self._gone.is_set()

    @property
    def is_read_here(self) -> bool:
        """Whether the calling thread is the one that takes its messages."""
        return threading.current_thread() is self._reader

    def wait_until_ready(self, timeout_s: float) -> str | None:
        """Waits until it runs; returns what is wrong if it does not."""
        if self._ready.wait(timeout_s) and not self._gone.is_set():
            return None
        ended = self.describe_end() if self._gone.is_set() else None
        return ended or f"{self.name} has not started in {timeout_s:g} s"

    def watch(self, latch: FailureLatch, timeout_s: float) -> None:
        """From here on its end, or no sign of life for ``timeout_s`` seconds, is a failure of this rank."""
        self._latch = latch
        self._heartbeats = Heartbeats(self._rank, latch, timeout_s, lambda rank: self.describe_end(), self.name)
        self._heartbeats.add(self._rank, ControlConnection(self._my_heartbeat))
        # It may be stopped; what still waits for its answer is woken by the end of the connection.
        latch.subscribe(lambda failure: self._killing.set(_GRACE_S))

    def wait_until_gone(self, timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` seconds for its end; tells whether it has come."""
        return self._gone.wait(timeout_s)

    def send(self, message: Any) -> None:
        """Sends a message; by one thread at a time.

        Raises:
            OSError: if it is gone.
        """
        self._connection.send(message)

    def describe_end(self) -> str | None:
        """How it has ended; None if it has not."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None
        return describe_exit(code, self.name)

    def let_end(self, last_message: Any) -> None:
        """Has it end by itself after a failure, when it has done what it is told, also if this process ends before it.

        Args:
            last_message: what tells it.
        """
        self._ends_itself = True
        self._killing.close()
        try:
            self.send(last_message)
        except OSError as error:
            log.debug("%s is gone: %s", self.name, error)

    def kill(self) -> None:
        """Kills it, which is no failure from here on; `end` is to follow."""
        if self._heartbeats is not None:
            self._heartbeats.close()
        self._process.kill()

    def end(self, last_message: Any) -> None:
        """Ends it; idempotent.

        Args:
            last_message: what tells it to end, unless the run has failed.
        """
        if self._ended:
            return
        self._ended = True
        self._killing.close()
        if self._heartbeats is not None:
            self._heartbeats.close()
        failed = self._latch is None or self._latch.failure is not None
        try:
            if not failed and not self._gone.is_set():
                self.send(last_message)
            if not failed or self._ends_itself:
                self._process.wait(_END_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.debug("%s does not end by itself: %s", self.name, error)
        if not self._ends_itself:
            self._process.kill()
            self._process.wait()
        # All its descriptors are closed now, so the reader has come to the end.
        self._reader.join(_END_TIMEOUT_S)
        self._connection.close()
        self._my_heartbeat.close()

    def _read(self) -> None:
        try:
            while (received := self._receive()) is not None:
                if received == READY:
                    self._ready.set()
                else:
                    self._on_message(received)
        finally:
            self._gone.set()
            self._ready.set()
            self._on_gone()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            log.debug("%s has closed its connection: %s", self.name, error)
            return None


def _interpreter(module: str, descriptors: tuple[int, int]) -> subprocess.Popen[bytes]:
    arguments = [json.dumps(sys.path), *map(str, (*descriptors, os.getpid()))]
    command = [sys.executable, "-c", _BOOT.format(module=module, name=module.rpartition(".")[2]), *arguments]
    return subprocess.Popen(command, pass_fds=descriptors)


def check_policy_can_travel(policy: StalenessPolicy, asked: str, way_out: str) -> None:
    """Refuses a staleness policy that cannot be sent to another process.

    Args:
        policy: what is done with a gradient because of its age.
        asked: the option that has it sent.
        way_out: what to do without it.

    Raises:
        ValueError: if it cannot; the message says why, and what to do.
    """
    kind = type(policy)
    try:
        if kind.__module__ == "__main__":
            raise pickle.PicklingError("it is defined in the script itself, which is not run there")
        pickle.dumps(policy)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{asked} sends the staleness policy to another process, and {kind.__name__} cannot go there: {error}. "
            f"Define it in a module that can be imported, or {way_out}"
        ) from error
