"""Lightning's launchers with three changes: a rank's failure is explained, reported, and never answered by SIGKILL.

Lightning's script launcher kills rank 0 with the others when a child exits with an error
(`fabric/strategies/launchers/subprocess_script.py`, `_ChildProcessObserver`), so nobody could say which rank failed
and why; its multiprocessing launcher leaves the children running if only the parent is interrupted. Private API: see
`loops.py` for the rule, and the canary tests.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_async.strategy import AsyncAMSGradStrategy

__all__ = ["ProcessLauncher", "ScriptLauncher"]

_POLL_S = 0.5
_EXIT_STATUS_TIMEOUT_S = 1.0


class ScriptLauncher(_SubprocessScriptLauncher):
    """Starts the script once per rank, or runs under torchrun or SLURM, which did."""

    def __init__(self, strategy: AsyncAMSGradStrategy) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, args=(list(self.procs),), name="child-watch", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        with self._strategy.guard_run():
            return function(*args, **kwargs)

    def describe_end(self, local_rank: int) -> str | None:
        """How the process of ``local_rank`` ended, or None if it still runs or was not started from here."""
        if not 0 < local_rank <= len(self.procs):
            return None
        process = self.procs[local_rank - 1]
        try:
            return _describe_exit(process.wait(_EXIT_STATUS_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return None

    def _watch(self, processes: list[subprocess.Popen[bytes]]) -> None:
        # The lifelines see most deaths first; this sees those that come before they exist.
        while any(process.poll() is None for process in processes):
            for local_rank, process in enumerate(processes, start=1):
                if process.poll():
                    time.sleep(_EXIT_STATUS_TIMEOUT_S)
                    self._strategy.report_failure(local_rank, _describe_exit(process.returncode))
                    return
            time.sleep(_POLL_S)


class ProcessLauncher(_MultiProcessingLauncher):
    """Starts the ranks by spawn, fork or forkserver from a process that is none of them."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        finally:
            self._end_children()

    @override
    def _wrapping_function(self, process_idx: int, trainer: Any, function: Callable[..., Any], *rest: Any) -> None:
        strategy: Any = self._strategy

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with strategy.guard_run():
                return function(*args, **kwargs)

        super()._wrapping_function(process_idx, trainer, guarded, *rest)

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        strategy: Any = self._strategy
        return {**super().get_extra_results(trainer), "async_stats": strategy.stats}

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        strategy: Any = self._strategy
        strategy.stats = extra.pop("async_stats")
        super().update_main_process_results(trainer, extra)

    def _end_children(self) -> None:
        for process in self.procs:
            # Ctrl+C reaches the children too, and they end by themselves unless only the parent was interrupted.
            process.join(timeout=5.0)
            if process.is_alive():
                process.kill()
                process.join()


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process exited with code {code}"
