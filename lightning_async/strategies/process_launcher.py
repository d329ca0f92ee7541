"""Lightning's multiprocessing launcher, but a rank's failure is explained, and no rank outlives the run.

Lightning's blames whichever rank exits first, waits half a minute for a stopped one, and waits for ever for the result
of ranks that left after a SIGTERM. Private API: see the canary tests.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch.multiprocessing as mp
from lightning.fabric.strategies.launchers.multiprocessing import _check_bad_cuda_fork, _check_missing_main_guard
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_async.runtime.admission import Invitation
from lightning_async.runtime.failure import WorkerFailedError, tell_in_one_line
from lightning_async.runtime.handshake import Address
from lightning_async.runtime.interrupts import INTERRUPTED, held_back, let_through, say_interrupted
from lightning_async.runtime.launchers import Launchers
from lightning_async.runtime.listening import reserved
from lightning_async.runtime.prctl import signal_at_parents_end
from lightning_async.runtime.process_groups import end_groups_of_one_rank, forget_inherited_groups
from lightning_async.strategies import launching
from lightning_async.strategies.host_processes import HostProcesses
from lightning_async.strategies.launch_errors import describe_own_start, no_script_here
from lightning_async.strategies.mailbox import Mailbox
from lightning_async.strategies.new_starts import NewStarts
from lightning_async.strategies.protocols import LaunchedStrategy, RunGuard

__all__ = ["ProcessLauncher"]

StartMethod = Literal["spawn", "fork", "forkserver"]


class ProcessLauncher(_MultiProcessingLauncher):
    """Starts the ranks by spawn, fork or forkserver from a process that is none of them.

    Attributes:
        start_method: which of the three.
    """

    def __init__(self, strategy: LaunchedStrategy, guard: RunGuard, start_method: StartMethod) -> None:
        launched: Any = strategy
        super().__init__(launched, start_method=start_method)
        self._guard = guard
        self.start_method = start_method
        # Whether this is the process of a rank; and where the first of a host's says why the run has failed.
        self._is_rank = False
        self._told: Mailbox | None = None
        # Whether that process knows where rank 0 says which ranks are started again.
        self._has_served = False

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

    def exit_process(self, code: int) -> None:
        """Ends this rank's process at once; the one that has started it would see no more than the status."""
        if self._told is not None and self._guard.failure is not None:
            self._told.put(self._guard.failure)
        os._exit(code)

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        # As in the base class, but for who waits for the ranks.
        strategy: Any = self._strategy
        if trainer is not None:
            strategy.refuse_before_launch(trainer)
        if self._start_method == "spawn":
            _check_missing_main_guard()
        else:
            _check_bad_cuda_fork()
        if self._already_fit and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            raise NotImplementedError(
                "trainer.fit() cannot be called twice on one Trainer whose ranks are started by spawn or fork. Create "
                "a new Trainer and pass fit(ckpt_path=...)."
            )
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            strategy.count_fit(trainer)
        starts = self._starts_of(trainer)
        if self._start_method == "fork":
            end_groups_of_one_rank()
        try:
            with starts.named():
                while starts.is_wanted:
                    starts.wait()
                    result = self._run_ranks([trainer, function, args, kwargs], starts)
        except KeyboardInterrupt:
            # Between two starts.
            _end_interrupted()
        except WorkerFailedError:
            tell_in_one_line()
            raise
        if trainer is None or result is None:
            return result
        self._already_fit |= trainer.state.fn == TrainerFn.FITTING
        self._recover_results_in_main_process(result, trainer)
        return result.trainer_results

    def _run_ranks(self, arguments: list[Any], starts: NewStarts) -> Any:
        """Starts the ranks, and those again that are lost, until the run is over; returns the first rank's result."""
        strategy: Any = self._strategy
        mailbox = Mailbox(mp.get_context(self._start_method))
        states = [_GlobalStateSnapshot.capture()] if self._start_method == "spawn" else []
        arguments = [*arguments, mailbox, *states]
        error_files: Sequence[str] = ()
        meeting_place = ExitStack()
        try:
            meeting_place.enter_context(_main_port(strategy.cluster_environment.main_port))
            with held_back():
                context: Any = mp.start_processes(  # type: ignore[no-untyped-call]
                    self._wrapping_function,
                    args=arguments,
                    nprocs=strategy.num_processes,
                    start_method=self._start_method,
                    join=False,
                )
                self.procs, error_files = context.processes, context.error_files
            processes = HostProcesses(
                self.procs,
                error_files,
                strategy.node_rank,
                self._guard.goes_on,
                start=lambda index, address: self._start_again(index, address, arguments),
            )
            with (
                self._passing_on_sigterm() as came,
                starts.attempt(lambda: processes.has_lost_first and not came),
            ):
                return processes.wait(mailbox)
        except KeyboardInterrupt:
            # For those that are still importing; the others hear of Ctrl+C themselves.
            super().kill(signal.SIGTERM)
            _end_interrupted()
        finally:
            self._end_children()
            meeting_place.close()
            mailbox.close()
            for path in error_files:
                Path(path).unlink(missing_ok=True)

    def _starts_of(self, trainer: pl.Trainer | None) -> NewStarts:
        """Whether the ranks, if all of them are started here, can go on from what a lost rank 0 has left."""
        strategy: Any = self._strategy
        is_fit = trainer is not None and trainer.state.fn == TrainerFn.FITTING and strategy.num_nodes == 1
        hint = "the run would go on from a snapshot, and there are none: see snapshot_every_s" if is_fit else ""
        return NewStarts(self._guard.resilience, is_fit and strategy.takes_snapshots, hint)

    @override
    def kill(self, signum: int) -> None:
        super().kill(signum)
        if isinstance(sys.exc_info()[1], KeyboardInterrupt) and not self._is_rank:
            # Before there were ranks; Lightning asks for this last.
            _end_interrupted()

    @override
    def _wrapping_function(self, process_idx: int, trainer: Any, function: Callable[..., Any], *rest: Any) -> None:
        guard, mailbox = self._guard, rest[2]
        self._is_rank = True
        forget_inherited_groups()
        mailbox.only_write()
        # torch has SIGINT sent, which ends the run. Where it goes on without this host, its ranks leave it.
        leaves = guard.goes_on and self._first_rank > 0
        signal_at_parents_end(signal.SIGTERM if leaves else signal.SIGINT)
        self._told = mailbox if process_idx == 0 else None

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                with guard.guard_run():
                    let_through()
                    return function(*args, **kwargs)
            except BaseException:
                if self._told is not None and guard.failure is not None:
                    self._told.put(guard.failure)
                raise

        super()._wrapping_function(process_idx, trainer, guarded, *rest)

    def serve(self, address: Address, launchers: Launchers | None) -> None:
        """Tells the process that has started the ranks where rank 0 says which of them are started again.

        Args:
            address: where rank 0 listens.
            launchers: rank 0's side, in its process; None on other hosts.
        """
        if self._told is not None and not self._has_served:
            self._has_served = True
            self._told.put(address)

    def _start_again(self, index: int, address: Address, arguments: Sequence[Any]) -> Any:
        """Starts a lost rank again; returns its process."""
        invitation = Invitation(address, self._first_rank + index)
        context: Any = mp.get_context(self._start_method)
        process = context.Process(target=self._run_again, args=(index, invitation, *arguments), daemon=False)
        process.start()
        return process

    @property
    def _first_rank(self) -> int:
        strategy: Any = self._strategy
        return int(strategy.node_rank * strategy.num_processes)

    def _run_again(self, index: int, invitation: Invitation, *arguments: Any) -> None:
        # A fork has the handler of the process that passes the signal on to its children, and has none itself.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= invitation.variables()
        self._wrapping_function(index, *arguments)

    @contextmanager
    def _passing_on_sigterm(self) -> Iterator[list[int]]:
        """Leaves the stop to the ranks: they end together, and this process after them; gives the signals that came."""
        came: list[int] = []
        if threading.current_thread() is not threading.main_thread():
            yield came
            return

        def pass_on(signum: int, frame: FrameType | None) -> None:
            came.append(signum)
            self.kill(signum)

        previous = signal.signal(signal.SIGTERM, pass_on)
        try:
            yield came
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
        deadline = time.monotonic() + launching.END_TIMEOUT_S
        for process in self.procs:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            # Two pipes, which would be open until the garbage collector comes by.
            process.close()
        self.procs = []


def _end_interrupted() -> NoReturn:
    say_interrupted()
    # Lightning would exit with status 1.
    raise SystemExit(INTERRUPTED) from None


@contextmanager
def _main_port(port: int) -> Iterator[None]:
    """Tells the ranks where they meet, and keeps the port free for them.

    Lightning leaves ``MASTER_PORT`` set, so that the Trainers after this one would insist on a port that may long be
    another's by then.
    """
    is_given = "MASTER_PORT" in os.environ
    os.environ["MASTER_PORT"] = str(port)
    try:
        with reserved(port):
            yield
    finally:
        if not is_given:
            os.environ.pop("MASTER_PORT", None)
