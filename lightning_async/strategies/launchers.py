"""Lightning's launchers, but a rank's failure is explained, and no rank outlives the run.

Lightning's script launcher kills rank 0 with the others when a child exits with an error
(`fabric/strategies/launchers/subprocess_script.py`, `_ChildProcessObserver`), so nobody could say which rank failed
and why, and leaves the children running when rank 0 fails. Its multiprocessing launcher blames whichever rank exits
first, waits half a minute for a stopped one, and waits for ever for the result of ranks that left after a SIGTERM.
Private API: see the canary tests.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.multiprocessing import _check_bad_cuda_fork, _check_missing_main_guard
from lightning.fabric.strategies.launchers.subprocess_script import (
    _HYDRA_AVAILABLE,
    _basic_subprocess_cmd,
    _hydra_subprocess_cmd,
)
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from typing_extensions import override

from lightning_async.runtime.admission import Invitation
from lightning_async.runtime.failure import RunFailure, WorkerFailedError, describe_exit, tell_in_one_line
from lightning_async.runtime.interrupts import INTERRUPTED, held_back, let_through, say_interrupted
from lightning_async.strategies.launch_errors import describe_own_start, no_script_here
from lightning_async.strategies.protocols import LaunchedStrategy, RunGuard

__all__ = ["ProcessLauncher", "ScriptLauncher", "back_off_s"]

StartMethod = Literal["spawn", "fork", "forkserver"]

# How many ranks the first Trainer of this script has started; for its other Trainers, here and in the other ranks.
_STARTED_RANKS = "LIGHTNING_ASYNC_STARTED_RANKS"

# The processes of these ranks, on this host and but for this one; and which of them a run has gone on without.
_started: list[subprocess.Popen[bytes]] = []
_lost: set[int] = set()
# How often a function of a trainer (fit, test ...) was run in this process.
_launches = 0

# Before a lost rank is started again: at once, then twice as long each time.
_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 60.0
_POLL_S = 0.5
_EXIT_POLL_S = 0.05
_EXIT_STATUS_TIMEOUT_S = 1.0
# The ranks end by themselves when one of them fails, at the latest by their exit guards, five seconds later.
_END_TIMEOUT_S = 8.0


class ScriptLauncher(_SubprocessScriptLauncher):
    """Starts the script once per rank, or runs under torchrun or SLURM, which did."""

    def __init__(self, strategy: LaunchedStrategy, guard: RunGuard) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy
        self._guard = guard
        self._restarts: dict[int, int] = {}
        # Set up when ranks are started: it cannot be pickled.
        self._is_over: threading.Event | None = None

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
        if trainer is not None:
            self._strategy.refuse_before_launch(trainer)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        world_size = self.num_processes * self.num_nodes
        if self.cluster_environment.creates_processes_externally:
            if isinstance(self.cluster_environment, LightningEnvironment):
                _refuse_another_number_of_ranks(world_size, self._strategy)
        elif world_size > 1:
            # For one rank there is nobody to start, and the variables that Lightning sets for the others would keep
            # this process's next run from starting any.
            os.environ[_STARTED_RANKS] = str(world_size)
            with held_back():
                self._call_children_scripts()
                _started[:] = self.procs
        global _launches
        _launches += 1
        # A script's later Trainers train with the ranks that the first has started, as far as they are left.
        self.procs = [process for process in _started if process.pid not in _lost]
        self._restarts.clear()
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
            self.end_children(_END_TIMEOUT_S)
            raise
        finally:
            is_over.set()
            self._is_over = None

    def restart(self, local_rank: int, invitation: Invitation, most: int) -> str | None:
        """Starts a lost rank again soon, if it was started from here and not too often before.

        Args:
            local_rank: which one.
            invitation: what it joins the run with.
            most: how often it may be started again.

        Returns:
            What becomes of it, in words; None if it was not started from here.
        """
        if not 0 < local_rank <= len(self.procs):
            return None
        self.procs[local_rank - 1].kill()
        if _launches > 1:
            # It would run the script from its beginning, and take this run for the first one.
            return "it is not started again, since this is not the script's first run"
        count = self._restarts[local_rank] = self._restarts.get(local_rank, 0) + 1
        if count > most:
            return f"it is not started again (max_restarts={most})"
        delay_s = back_off_s(count)
        args = (local_rank, invitation, delay_s)
        threading.Thread(target=self._start_again, args=args, name="restart", daemon=True).start()
        return f"it is started again{f' in {delay_s:g} s' if delay_s else ''} ({count} of {most})"

    def _start_again(self, local_rank: int, invitation: Invitation, delay_s: float) -> None:
        is_over = self._is_over
        if is_over is None or is_over.wait(delay_s):
            return
        command, folder = _basic_subprocess_cmd(), None
        if _HYDRA_AVAILABLE and importlib.import_module("hydra.core.hydra_config").HydraConfig.initialized():
            command, folder = _hydra_subprocess_cmd(local_rank)
        variables = os.environ | invitation.variables() | {"LOCAL_RANK": str(local_rank)}
        process = subprocess.Popen(command, env=variables, cwd=folder)
        _started[_started.index(self.procs[local_rank - 1])] = process
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
        """Gives the ranks that were started from here ``timeout_s`` to end, then kills them."""
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
                        self._guard.report_failure(local_rank, describe_exit(process.returncode))
                    if not self._guard.goes_on:
                        return
                    _lost.add(process.pid)
            over.wait(_POLL_S)


class ProcessLauncher(_MultiProcessingLauncher):
    """Starts the ranks by spawn, fork or forkserver from a process that is none of them."""

    def __init__(self, strategy: LaunchedStrategy, guard: RunGuard, start_method: StartMethod) -> None:
        launched: Any = strategy
        super().__init__(launched, start_method=start_method)
        self._guard = guard
        # Whether this is the process of a rank.
        self._is_rank = False
        # Where rank 0 says how a lost rank joins, and what it has said; how often each was started again.
        self._invitations: Any = None
        self._invited: tuple[Invitation, int] | None = None
        self._restarts: dict[int, int] = {}

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        """Whether the ranks are forked: then they know what was typed.

        Raises:
            MisconfigurationException: if they are not; names the strategy of this package that works there.
        """
        if self._start_method != "fork":
            strategy: Any = self._strategy
            raise no_script_here(strategy, f"{self._start_method}, which imports the script again")
        return True

    def describe_start(self, num_nodes: int) -> str:
        """What starts the ranks; whatever the environment says of LOCAL_RANK, they are started here."""
        return describe_own_start(num_nodes)

    def describe_end(self, local_rank: int) -> str | None:
        """None: a rank's process cannot see how another one has ended."""
        return None

    def interrupt(self) -> None:
        """Ends this process at once, after Ctrl+C; the one that has started it says so."""
        os._exit(INTERRUPTED)

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        # As in the base class, but for who waits for the ranks.
        if trainer is not None:
            strategy_to_ask: Any = self._strategy
            strategy_to_ask.refuse_before_launch(trainer)
        if self._start_method == "spawn":
            _check_missing_main_guard()
        else:
            _check_bad_cuda_fork()
        if self._already_fit and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            raise NotImplementedError(
                "trainer.fit() cannot be called twice on one Trainer whose ranks are started by spawn or fork. Create "
                "a new Trainer and pass fit(ckpt_path=...)."
            )
        strategy: Any = self._strategy
        os.environ["MASTER_PORT"] = str(strategy.cluster_environment.main_port)
        results = mp.get_context(self._start_method).SimpleQueue()
        states = [_GlobalStateSnapshot.capture()] if self._start_method == "spawn" else []
        self._invitations = mp.get_context(self._start_method).SimpleQueue()
        arguments = [trainer, function, args, kwargs, results, *states]
        error_files: Sequence[str] = ()
        try:
            with held_back():
                context: Any = mp.start_processes(  # type: ignore[no-untyped-call]
                    self._wrapping_function,
                    args=arguments,
                    nprocs=strategy.num_processes,
                    start_method=self._start_method,
                    join=False,
                )
                self.procs, error_files = context.processes, context.error_files
            with self._passing_on_sigterm():
                result = self._wait(results, error_files, arguments)
        except KeyboardInterrupt:
            # For those that are still importing; the others hear of Ctrl+C themselves.
            super().kill(signal.SIGTERM)
            say_interrupted()
            # Lightning would exit with status 1.
            raise SystemExit(INTERRUPTED) from None
        except WorkerFailedError:
            tell_in_one_line()
            raise
        finally:
            self._end_children()
            results.close()
            self._invitations.close()
            for path in error_files:
                Path(path).unlink(missing_ok=True)
        if trainer is None:
            return result
        self._already_fit |= trainer.state.fn == TrainerFn.FITTING
        self._recover_results_in_main_process(result, trainer)
        return result.trainer_results

    @override
    def kill(self, signum: int) -> None:
        super().kill(signum)
        if isinstance(sys.exc_info()[1], KeyboardInterrupt) and not self._is_rank:
            # Before there were ranks. Lightning, which asks for this last, would exit with status 1.
            say_interrupted()
            raise SystemExit(INTERRUPTED)

    @override
    def _wrapping_function(self, process_idx: int, trainer: Any, function: Callable[..., Any], *rest: Any) -> None:
        guard, results = self._guard, rest[2]
        self._is_rank = True

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                with guard.guard_run():
                    let_through()
                    return function(*args, **kwargs)
            except BaseException:
                # Only rank 0 writes to the queue: a rank that is killed while it writes leaves it locked.
                if process_idx == 0 and guard.failure is not None:
                    results.put(guard.failure)
                raise

        super()._wrapping_function(process_idx, trainer, guarded, *rest)

    def invite(self, invitation: Invitation, most: int) -> None:
        """Tells the process that has started the ranks how one that is lost joins the run; called by rank 0.

        Args:
            invitation: what ranks join with; each with its own number.
            most: how often one may be started again.
        """
        if self._invitations is not None:
            self._invitations.put((invitation, most))

    def restart(self, local_rank: int, invitation: Invitation, most: int) -> str | None:
        """None: the process that has started the ranks starts them again."""
        return None

    def _start_again(self, index: int, arguments: Sequence[Any]) -> bool:
        """Starts a lost rank again, if it may be; returns whether it is."""
        while not self._invitations.empty():
            self._invited = self._invitations.get()
        count = self._restarts[index] = self._restarts.get(index, 0) + 1
        if self._invited is None or count > self._invited[1]:
            return False
        strategy: Any = self._strategy
        address, rank = self._invited[0].address, strategy.node_rank * strategy.num_processes + index
        context: Any = mp.get_context(self._start_method)
        process = context.Process(
            target=self._run_again, args=(index, Invitation(address, rank), back_off_s(count), *arguments), daemon=False
        )
        process.start()
        self.procs[index] = process
        return True

    def _run_again(self, index: int, invitation: Invitation, delay_s: float, *arguments: Any) -> None:
        # A fork has the handler of the process that passes the signal on to its children, and has none itself.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(delay_s)
        os.environ |= invitation.variables()
        self._wrapping_function(index, *arguments)

    def _wait(self, results: Any, error_files: Sequence[str], arguments: Sequence[Any] = ()) -> Any:
        """Waits for rank 0's result.

        Raises:
            WorkerFailedError: if a rank has failed; all have ended then.
            SIGTERMException: if the ranks have left together after a SIGTERM.
        """
        result: Any = None
        ended: list[int] = []
        running = dict(enumerate(self.procs))
        deadline = float("inf")
        while running and time.monotonic() < deadline:
            connection.wait([process.sentinel for process in running.values()], timeout=_POLL_S)
            if result is None and not results.empty():
                # Also while its sender runs: a result that is larger than a pipe's buffer waits for its reader.
                result = results.get()
            for index in [index for index, process in running.items() if not process.is_alive()]:
                process = running.pop(index)
                process.join()
                if index and process.exitcode and self._guard.goes_on and self.procs[0].is_alive():
                    if _was_lost(process.exitcode, error_files[index]) and self._start_again(index, arguments):
                        running[index] = self.procs[index]
                    continue
                ended.append(index)
                if index == 0 if self._guard.goes_on else process.exitcode != 0:
                    deadline = min(deadline, time.monotonic() + _END_TIMEOUT_S)
        if result is None and not results.empty():
            result = results.get()
        failed = isinstance(result, RunFailure) or running or any(process.exitcode != 0 for process in self.procs)
        if failed and self._guard.goes_on and self.procs[0].exitcode == 0:
            # Rank 0 has come to the end without those that were lost, or were taken out and are only stopped.
            for process in running.values():
                process.kill()
            failed = isinstance(result, RunFailure)
        if failed:
            for process in running.values():
                process.kill()
            known = result if isinstance(result, RunFailure) else None
            raise WorkerFailedError(self._failure(known, ended, sorted(running), error_files))
        if result is None:
            raise SIGTERMException
        return result

    def _failure(
        self, known: RunFailure | None, ended: list[int], stuck: list[int], error_files: Sequence[str]
    ) -> RunFailure:
        strategy: Any = self._strategy
        first_rank = strategy.node_rank * strategy.num_processes
        if known is not None and known.rank - first_rank not in range(len(self.procs)):
            # It was started on another host, where its exit status and its traceback are.
            return known
        index = self._culprit(ended, stuck, error_files) if known is None else known.rank - first_rank
        code = self.procs[index].exitcode or 0
        if known is not None and (index in stuck or code >= 0):
            reason = known.reason
        else:
            reason = "its process did not end" if index in stuck else describe_exit(code)
        traceback = _error_of(error_files[index])
        return RunFailure(first_rank + index, f"{reason}\n\n{traceback}" if traceback else reason)

    def _culprit(self, ended: list[int], stuck: list[int], error_files: Sequence[str]) -> int:
        """The process that most likely began it, if rank 0 could not say: bystanders exit with code 1."""
        codes = {index: self.procs[index].exitcode or 0 for index in ended}
        by_signal = [index for index in ended if codes[index] < 0]
        with_error = [index for index in ended if os.path.exists(error_files[index])]
        with_code = [index for index in ended if codes[index] > 1]
        with_any = [index for index in ended if codes[index]]
        return [*by_signal, *with_error, *with_code, *stuck, *with_any][0]

    @contextmanager
    def _passing_on_sigterm(self) -> Iterator[None]:
        """Leaves the stop to the ranks: they end together, and this process after them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, lambda signum, frame: self.kill(signum))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        strategy: Any = self._strategy
        return {**super().get_extra_results(trainer), "async_stats": strategy.stats, "async_choice": strategy.choice}

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        strategy: Any = self._strategy
        strategy.stats, strategy.choice = extra.pop("async_stats"), extra.pop("async_choice")
        super().update_main_process_results(trainer, extra)

    def _end_children(self) -> None:
        # Ctrl+C reaches the children too, and they end by themselves unless only the parent was interrupted.
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in self.procs:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            # Two pipes, which would be open until the garbage collector comes by.
            process.close()
        self.procs = []


def back_off_s(count: int) -> float:
    """Seconds to wait before a rank is started for the ``count``-th time again.

    Examples:
        >>> [back_off_s(count) for count in (1, 2, 3, 4, 50)]
        [0.0, 1.0, 2.0, 4.0, 60.0]
    """
    return 0.0 if count == 1 else min(_FIRST_BACK_OFF_S * 2 ** min(count - 2, 30), _LONGEST_BACK_OFF_S)


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


def _was_lost(code: int, error_file: str) -> bool:
    """Whether a process has ended otherwise than by an error of user code, which ends the run."""
    return code != 1 or "MemoryError" in (error := _error_of(error_file)) or "OutOfMemoryError" in error


def _error_of(path: str) -> str:
    """The traceback that torch has written for a process that ended with an exception."""
    try:
        return str(pickle.loads(Path(path).read_bytes()))
    except FileNotFoundError:
        return ""
