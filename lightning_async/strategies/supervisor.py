"""How ranks are started, how they find each other, and how they end together."""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from typing_extensions import override

from lightning_async.exchange.remote_service import HolderProcess
from lightning_async.runtime.failure import RunFailure
from lightning_async.runtime.membership import Membership, guard_shutdown
from lightning_async.runtime.process_groups import open_exchange_group
from lightning_async.strategies.collectives import PhasedCollectives
from lightning_async.strategies.finders import refuse_finders
from lightning_async.strategies.launchers import ProcessLauncher, ScriptLauncher

__all__ = ["StartedRanks"]

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0


class StartedRanks(PhasedCollectives):
    """The part of the strategy that every run needs, whether it trains or evaluates.

    Attributes:
        worker_timeout_s: seconds without a sign of life after which a rank counts as lost; set by the subclass.
    """

    worker_timeout_s: float
    _membership: Membership | None = None
    # On rank 0, where holder and updates are to have a process of their own.
    _holder_process: HolderProcess | None = None

    @override
    def _configure_launcher(self) -> None:
        if self._layer_sync is not None:
            raise MisconfigurationException(
                f"{self.strategy_name} cannot take Trainer(sync_batchnorm=True): synchronised batch norm is a "
                "collective in every forward, and the ranks do not run forward together. Leave it out (running "
                'statistics are averaged over the ranks before each validation), or use strategy="ddp".'
            )
        if self._start_method == "popen":
            self._launcher = ScriptLauncher(self)
        else:
            self._launcher = ProcessLauncher(self, start_method=self._start_method)

    @override
    def _get_process_group_backend(self) -> str:
        devices = self.parallel_devices or []
        if self._process_group_backend is None and len(set(devices)) < len(devices) and self.root_device.type == "cuda":
            # NCCL refuses a group in which two ranks have the same GPU.
            return "gloo"
        return super()._get_process_group_backend()

    def guard_run(self) -> AbstractContextManager[None]:
        """What a launcher runs the trainer's function in: no failure of any rank leaves another one waiting."""
        self.set_world_ranks()
        known: dict[str, Any] = {}
        if isinstance(self._launcher, ScriptLauncher):
            known = {"describe_end": self._describe_end, "exit_process": self._launcher.exit_process}
        self._membership = Membership(self.global_rank, self.worker_timeout_s, graceful=(SIGTERMException,), **known)
        return self._guarded(self._membership)

    @contextmanager
    def _guarded(self, membership: Membership) -> Iterator[None]:
        with membership.guard():
            try:
                yield
            finally:
                # Lightning does not tear a spawned rank down that fails.
                self._end_holder_process()

    @property
    def _wants_holder_process(self) -> bool:
        return False

    def _end_holder_process(self) -> None:
        process, self._holder_process = self._holder_process, None
        if process is not None:
            process.end()

    @property
    def failure(self) -> RunFailure | None:
        """The first failure of the run, as far as this rank knows; None while there is none."""
        return None if self._membership is None else self._membership.latch.failure

    def report_failure(self, local_rank: int, reason: str) -> None:
        """Tells this rank that the process of another one on this host has ended with an error."""
        assert self._membership is not None
        self._membership.latch.trip(RunFailure(self.node_rank * self.num_processes + local_rank, reason))

    def _describe_end(self, rank: int) -> str | None:
        launcher: Any = self._launcher
        described: str | None = launcher.describe_end(rank - self.node_rank * self.num_processes)
        return described

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        refuse_finders(self.lightning_module.trainer)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != self.world_size:
            # Lightning would take the group that an earlier run with one rank has left for this run's.
            dist.destroy_process_group()
        if self._wants_holder_process and self.is_global_zero and self.world_size > 1:
            # It imports while the ranks find each other.
            self._holder_process = HolderProcess()
        with self._impatience():
            super().setup_environment()
            open_exchange_group(self._timeout)
        assert self._membership is not None and self.cluster_environment is not None
        host = "127.0.0.1" if self.num_nodes == 1 else self.cluster_environment.main_address
        self._membership.meet(self.world_size, host, super().broadcast)
        _prepare_exit()

    @contextmanager
    def _impatience(self) -> Iterator[None]:
        """Says what is being waited for if the ranks do not find each other soon; they give up after `timeout`."""
        environment, launcher = self.cluster_environment, self._launcher
        assert environment is not None
        assert isinstance(launcher, (ScriptLauncher, ProcessLauncher))
        hint = launcher.describe_start(self.num_nodes)
        timer = threading.Timer(
            _PATIENCE_S,
            lambda: log.warning(
                "rank %d of %d has waited %.0f s for the others at %s:%d; %s",
                self.global_rank,
                self.world_size,
                _PATIENCE_S,
                environment.main_address,
                environment.main_port,
                hint,
            ),
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@functools.cache
def _prepare_exit() -> None:
    # Once in a process, and by functions of this module: what is registered there is kept as long as the process.
    atexit.register(_leave_process_group)
    atexit.register(guard_shutdown)


def _leave_process_group() -> None:
    # Gloo's threads must be gone before the interpreter's statics are, or the process aborts on its way out.
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
