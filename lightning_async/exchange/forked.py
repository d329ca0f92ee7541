"""A child process by a fork of this one: what took seconds to import is there already."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Collection
from contextlib import suppress

from lightning_async.runtime.prctl import name_process, signal_at_parents_end

__all__ = ["ForkedProcess"]

_LOOK_S = 0.01


class ForkedProcess:
    """Runs ``main(*descriptors)`` of a module in a fork of this process; to its owner like a `subprocess.Popen`.

    It has this process's memory and none of its threads, sockets and files, but for the descriptors, and ends with it.
    For a process that was forked itself a moment ago: few threads, and no device, are in use.

    Args:
        module: which module.
        descriptors: stay open in the child.

    Attributes:
        pid: its process id.
    """

    def __init__(self, module: str, descriptors: Collection[int]) -> None:
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run(module, descriptors, parent)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; returns its exit status, as `subprocess.Popen` has it.

        Raises:
            subprocess.TimeoutExpired: if it does not end in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._poll() is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            time.sleep(_LOOK_S)
        assert self._code is not None
        return self._code

    def kill(self) -> None:
        """Kills it, if it has not ended."""
        if self._poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _poll(self) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                # Somebody else has asked for its status. What `subprocess` says then.
                self._code = 0
                return self._code
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _run(module: str, descriptors: Collection[int], parent: int) -> None:
    code = 1
    try:
        signal_at_parents_end(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        name_process(module.rpartition(".")[2])
        # What the parent's objects would close when they are collected is nothing by then.
        gc.freeze()
        _let_go_of_all_but(descriptors)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        importlib.import_module(module).main(*descriptors)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _let_go_of_all_but(descriptors: Collection[int]) -> None:
    """Puts /dev/null in the place of all others: no new descriptor gets the number of one that is closed later."""
    kept = {0, 1, 2, *descriptors}
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if (number := int(name)) not in {*kept, nothing}:
            # The listing's own is closed by now.
            with suppress(OSError):
                os.fstat(number)
                os.dup2(nothing, number)
