"""Lightning's script launcher, but a rank's failure is explained, and no rank outlives the run.

Lightning's kills rank 0 with the others when a child exits with an error
(`fabric/strategies/launchers/subprocess_script.py`, `_ChildProcessObserver`), so nobody could say which rank failed
and why, and leaves the children running when rank 0 fails. Private API: see the canary tests.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import (
    _HYDRA_AVAILABLE,
    _basic_subprocess_cmd,
    _hydra_subprocess_cmd,
)
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_async.runtime.admission import Invitation
from lightning_async.runtime.failure import WorkerFailedError, describe_exit, say, tell_in_one_line
from lightning_async.runtime.handshake import Address, HandshakeError
from lightning_async.runtime.interrupts import INTERRUPTED, held_back, let_through, say_interrupted
from lightning_async.runtime.launcher_connection import LauncherConnection, Lost
from lightning_async.runtime.launchers import Launchers
from lightning_async.runtime.listening import reserved
from lightning_async.strategies import launching
from lightning_async.strategies.launch_errors import describe_own_start, no_script_here, refuse_rank_without_device
from lightning_async.strategies.protocols import LaunchedStrategy, RunGuard
from lightning_async.transport.base import ChannelClosedError

__all__ = ["ScriptLauncher"]

# How many ranks the first Trainer of this script has started; for its other Trainers, here and in the other ranks.
_STARTED_RANKS = "LIGHTNING_ASYNC_STARTED_RANKS"

# The processes of these ranks, on this host and but for this one; and which of them a run has gone on without.
_started: list[subprocess.Popen[bytes]] = []
_lost: set[int] = set()
# How often a function of a trainer (fit, test ...) was run in this process.
_launches = 0

_EXIT_POLL_S = 0.05
_EXIT_STATUS_TIMEOUT_S = 1.0
# A process that is dying has closed its connections before its status is known.
_DYING_S = 0.2


class ScriptLauncher(_SubprocessScriptLauncher):
    """Starts the script once per rank, or runs under torchrun or SLURM, which did."""

    def __init__(self, strategy: LaunchedStrategy, guard: RunGuard) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy
        self._guard = guard
        # Set up when ranks are started: it cannot be pickled.
        self._is_over: threading.Event | None = None
        # Where rank 0 says which ranks are started again, once training has begun; what it has said already, and of
        # each rank which start of it is running.
        self._address: Address | None = None
        self._connection: LauncherConnection | None = None
        self._heard: set[Lost] = set()
        self._starts: dict[int, int] = {}

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        """Lightning asks in interactive sessions only, and its own refusal names a strategy of its own.

        Raises:
            MisconfigurationException: always; names the strategy of this package that works there.
        """
        raise no_script_here(self._strategy, "running the script again for each rank")

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        refuse_rank_without_device(self.cluster_environment.local_rank(), self.num_processes)
        if trainer is not None:
            self._strategy.refuse_before_launch(trainer)
        world_size = self.num_processes * self.num_nodes
        with ExitStack() as meeting_place:
            if self.cluster_environment.creates_processes_externally:
                if isinstance(self.cluster_environment, LightningEnvironment):
                    _refuse_another_number_of_ranks(world_size, self._strategy)
            elif world_size > 1:
                # For one rank there is nobody to start, and the variables that Lightning sets for the others would
                # keep this process's next run from starting any.
                os.environ[_STARTED_RANKS] = str(world_size)
                meeting_place.enter_context(reserved(self.cluster_environment.main_port))
                with held_back():
                    self._call_children_scripts()
                    _started[:] = self.procs
            return self._run(function, *args, **kwargs)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        global _launches
        _launches += 1
        # A script's later Trainers train with the ranks that the first has started, as far as they are left.
        self.procs = [process for process in _started if process.pid not in _lost]
        self._address, self._heard, self._starts = None, set(), {}
        is_over = self._is_over = threading.Event()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            with self._watching(), self._guard.guard_run():
                let_through()
                return function(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                # For those that are still importing; the others hear of Ctrl+C themselves.
                super().kill(signal.SIGTERM)
            elif isinstance(error, WorkerFailedError):
                tell_in_one_line()
            is_over.set()
            self.end_children(launching.END_TIMEOUT_S)
            raise
        finally:
            is_over.set()
            self._is_over = None
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.stop()

    def serve(self, address: Address, launchers: Launchers | None) -> None:
        """From here on lost ranks that were started from here are started again, as rank 0 says.

        Args:
            address: where rank 0 listens.
            launchers: rank 0's side, in its process; None on other hosts.
        """
        if self._address is not None or not self.procs:
            return
        self._address = address
        # It would run the script from its beginning, and take this run for the first one.
        unable = "it is not started again, since this is not the script's first run" if _launches > 1 else ""
        ranks = [self._first_rank + local_rank for local_rank in range(1, len(self.procs) + 1)]
        if launchers is not None:
            launchers.add_own(ranks, self.restart, unable)
            return
        try:
            connection = self._connection = LauncherConnection(address, ranks, self._strategy.node_rank, unable)
        except (HandshakeError, ChannelClosedError) as error:
            say(self._first_rank, f"lost ranks of this host are not started again: {error}")
            return
        threading.Thread(target=connection.heed, args=(self.restart,), name="restarts", daemon=True).start()

    @property
    def _first_rank(self) -> int:
        return self._strategy.node_rank * self._strategy.num_processes

    def restart(self, lost: Lost) -> None:
        """Ends what is left of a rank that is out of the run, and starts it again, if that is wanted."""
        if lost in self._heard or lost.leaves:
            return
        self._heard.add(lost)
        local_rank = lost.rank - self._first_rank
        process = self.procs[local_rank - 1]
        if self._first_rank:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_DYING_S)
            reason = lost.describe_end(process.returncode)
            say(self._first_rank, f"rank {lost.rank} is lost: {reason}; {lost.told}")
        process.kill()
        if lost.start:
            threading.Thread(target=self._start_again, args=(local_rank, lost), name="restart", daemon=True).start()

    def _start_again(self, local_rank: int, lost: Lost) -> None:
        is_over, address = self._is_over, self._address
        if is_over is None or address is None or is_over.wait(lost.delay_s):
            return
        command, folder = _basic_subprocess_cmd(), None
        if _HYDRA_AVAILABLE and importlib.import_module("hydra.core.hydra_config").HydraConfig.initialized():
            command, folder = _hydra_subprocess_cmd(local_rank)
        variables = os.environ | Invitation(address, lost.rank).variables() | {"LOCAL_RANK": str(local_rank)}
        process = subprocess.Popen(command, env=variables, cwd=folder)
        _started[_started.index(self.procs[local_rank - 1])] = process
        self._starts[local_rank] = lost.start
        self.procs[local_rank - 1] = process
        if is_over.is_set():
            # The run has ended meanwhile, and looks for its processes no more.
            process.kill()
            process.wait()
            _lost.add(process.pid)

    @override
    def kill(self, signum: int) -> None:
        super().kill(signum)
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            # Lightning, which asks for this last, would exit with status 1.
            raise SystemExit(INTERRUPTED)

    def interrupt(self) -> None:
        """Ends this process and those that were started from here at once, after Ctrl+C."""
        if self.procs or self._strategy.global_rank == 0:
            say_interrupted()
        self.end_children(0.0)
        os._exit(INTERRUPTED)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Reports a rank that was started from here and ends with an error."""
        if not self.procs:
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), name="child-watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            # It would keep the trainer, which has ended.
            over.set()
            watch.join(_EXIT_STATUS_TIMEOUT_S)

    def describe_start(self, num_nodes: int) -> str:
        """What starts the ranks, for a rank that waits for the others."""
        environment = self.cluster_environment
        if not isinstance(environment, LightningEnvironment):
            starter = type(environment).__name__.removesuffix("Environment")
            return f"{starter} starts them; see in what they print whether all of them have come so far"
        if _STARTED_RANKS not in os.environ and environment.creates_processes_externally:
            return "LOCAL_RANK is set, so Lightning takes it that something else starts them (unset it if nothing does)"
        return describe_own_start(num_nodes)

    def end_children(self, timeout_s: float) -> None:
        """Gives the ranks that were started from here ``timeout_s`` to end, then kills them.

        Those of a run that goes on without this rank are left to it.
        """
        if self._first_rank and self._guard.is_out:
            return
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self.procs) and time.monotonic() < deadline:
            time.sleep(_EXIT_POLL_S)
        for process in self.procs:
            process.kill()
            process.wait()

    def exit_process(self, code: int) -> None:
        """Ends this process at once, and the ranks that were started from here with it."""
        self.end_children(_EXIT_STATUS_TIMEOUT_S)
        os._exit(code)

    def describe_end(self, local_rank: int) -> str | None:
        """How the process of ``local_rank`` ended, or None if it still runs or was not started from here."""
        if not 0 < local_rank <= len(self.procs):
            return None
        process = self.procs[local_rank - 1]
        try:
            return describe_exit(process.wait(_EXIT_STATUS_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return None

    def _report(self, local_rank: int, code: int) -> None:
        start = self._starts.get(local_rank, 0)
        if self._connection is not None:
            self._connection.report(self._first_rank + local_rank, code, start)
        else:
            self._guard.report_failure(local_rank, code, start)

    def _watch(self, over: threading.Event) -> None:
        # The heartbeats see most deaths first; this sees those that come before they exist.
        running = True
        reported: set[int] = set()
        while (running or self._guard.goes_on) and not over.is_set():
            # Asked before the statuses are looked at, so that those of the last to end are looked at too.
            running = any(process.poll() is None for process in self.procs)
            for local_rank, process in enumerate(list(self.procs), start=1):
                if process.poll() and process.pid not in reported:
                    if over.wait(_EXIT_STATUS_TIMEOUT_S):
                        return
                    reported.add(process.pid)
                    if self.procs[local_rank - 1] is process:
                        self._report(local_rank, process.returncode)
                    if not self._guard.goes_on:
                        return
                    _lost.add(process.pid)
            over.wait(launching.POLL_S)


def _refuse_another_number_of_ranks(world_size: int, strategy: LaunchedStrategy) -> None:
    """Refuses a run that would wait for ranks which nobody starts: each rank runs the script once, for all Trainers.

    Raises:
        MisconfigurationException: if an earlier Trainer has started another number of ranks.
    """
    started = os.environ.get(_STARTED_RANKS)
    if started is not None and int(started) != world_size:
        raise MisconfigurationException(
            f"An earlier Trainer of this script has started {started} ranks, and each of them runs the whole script; "
            f"a Trainer for {world_size} would wait for ranks that do not exist. Give all of a script's Trainers the "
            "same number of devices, or start ranks for each anew: "
            f'{type(strategy).__name__}(start_method="spawn"), or strategy="{strategy.strategy_name}_spawn".'
        )
