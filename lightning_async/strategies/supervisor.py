"""How ranks are started, how they find each other, and how they end together."""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.exchange.remote_service import HolderProcess
from lightning_async.exchange.server import OnLost
from lightning_async.runtime.admission import Admission, Invitation, leave_invitation
from lightning_async.runtime.failure import FailureLatch, RunFailure, say
from lightning_async.runtime.handshake import HandshakeError
from lightning_async.runtime.interrupts import interruptible
from lightning_async.runtime.listener import Listener
from lightning_async.runtime.membership import Membership
from lightning_async.runtime.roster import Resilience
from lightning_async.runtime.shutdown import guard_shutdown
from lightning_async.runtime.whereabouts import announce_rank, announce_training
from lightning_async.shards.process import ShardProcess
from lightning_async.shards.shard_process import ShardServerProcess
from lightning_async.strategies.launch_errors import describe_refused_peer
from lightning_async.strategies.owned_launcher import OwnedLauncher
from lightning_async.strategies.process_launcher import ProcessLauncher
from lightning_async.strategies.protocols import LaunchedStrategy
from lightning_async.strategies.script_launcher import ScriptLauncher
from lightning_async.strategies.validation import refuse_ray_worker
from lightning_async.transport.base import ChannelClosedError

__all__ = ["RunSupervisor", "StartMethod"]

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0


def _do_nothing() -> None:
    """For a hook that is not in use; spawned ranks get it with the strategy, which takes a function with a name."""


class RunSupervisor:
    """Watches over one run, whether it trains or evaluates: every rank ends well, or all of them know why not.

    Args:
        strategy: whose ranks they are.
        start_method: how they are started.
        worker_timeout_s: seconds without a sign of life after which a rank counts as lost.
        resilience: what becomes of a fit when a rank is lost.

    Attributes:
        launcher: what starts the ranks.
        holder_process: the holder's own process, on rank 0, where it has one.
        shard_processes: those of the holder's shards but the first, on rank 0, where it has more.
        shard_servers: those of this host's shards, on its first rank, where they are reached over the network.
        let_go_of_shards: called before they are ended.
        on_failure: called in a spawned rank that fails.
    """

    def __init__(
        self, strategy: LaunchedStrategy, start_method: StartMethod, worker_timeout_s: float, resilience: Resilience
    ) -> None:
        self.resilience = resilience
        self._ranks = strategy
        self._worker_timeout_s = worker_timeout_s
        self._membership: Membership | None = None
        # Whether this rank is none of those that the run was started with.
        self._is_guest = False
        self.holder_process: HolderProcess | None = None
        self.shard_processes: list[ShardProcess] = []
        self.shard_servers: list[ShardServerProcess] = []
        self.let_go_of_shards: Callable[[], object] = _do_nothing
        self.on_failure: Callable[[], object] = _do_nothing
        if strategy.owner is None:
            refuse_ray_worker(type(strategy).__name__, strategy.cluster_environment)
        self.launcher: ScriptLauncher | ProcessLauncher | OwnedLauncher
        if strategy.owner is not None:
            self.launcher = OwnedLauncher(strategy, self, strategy.owner)
        elif start_method == "popen":
            self.launcher = ScriptLauncher(strategy, self)
        else:
            self.launcher = ProcessLauncher(strategy, self, start_method)

    # --- what the launcher calls -------------------------------------------------------------------------------------

    def guard_run(self) -> AbstractContextManager[None]:
        """What the trainer's function runs in: no failure of any rank leaves another one waiting."""
        self._ranks.set_world_ranks()
        announce_rank(self._ranks.global_rank)
        self._membership = Membership(
            self._ranks.global_rank,
            self._worker_timeout_s,
            describe_end=self._describe_end,
            graceful=(SIGTERMException,),
            has_stepped=lambda: self._ranks.has_stepped,
            exit_process=self.launcher.exit_process,
            is_owned=self._ranks.owner is not None,
            is_told_to_end=lambda: self._ranks.is_told_to_end,
            is_judged_last=isinstance(self.launcher, ProcessLauncher),
        )
        return self._guarded(self._membership)

    @contextmanager
    def _guarded(self, membership: Membership) -> Iterator[None]:
        try:
            with membership.guard():
                try:
                    yield
                except BaseException as error:
                    # Here on every rank, however it was started: Lightning tells callbacks nothing in forked ranks.
                    self._ranks.break_off(error)
                    if not isinstance(error, SIGTERMException):
                        # Rank 0 still trains with them, and would not let go before it hears of this error.
                        self._end_shard_servers(waits=False)
                    # Lightning does not tear a spawned rank down that fails.
                    if isinstance(self.launcher, ProcessLauncher):
                        self.on_failure()
                    raise
        finally:
            # Once the failure is known, for which the holder's process leaves its state.
            self.end_holder_processes()

    @property
    def goes_on(self) -> bool:
        """Whether a fit goes on without ranks that it loses."""
        return self.resilience.goes_on

    @property
    def failure(self) -> RunFailure | None:
        """The first failure of the run, as far as this rank knows; None while there is none."""
        return None if self._membership is None else self._membership.latch.failure

    @property
    def is_out(self) -> bool:
        """Whether this rank has left a run, or was taken out of it, that goes on without it."""
        return self._membership is not None and self._membership.is_out

    def report_failure(self, local_rank: int, code: int, start: int) -> None:
        """Tells this rank that the process of another one on this host has ended with an error.

        Args:
            local_rank: which one.
            code: its exit status.
            start: which start of that rank it was: 0 is the first.
        """
        assert self._membership is not None
        self._membership.lose(self._ranks.node_rank * self._ranks.num_processes + local_rank, code, start)

    def _describe_end(self, rank: int) -> str | None:
        return self.launcher.describe_end(self._local_rank(rank))

    def _local_rank(self, rank: int) -> int:
        return rank - self._ranks.node_rank * self._ranks.num_processes

    # --- what the strategy calls -------------------------------------------------------------------------------------

    @property
    def latch(self) -> FailureLatch:
        """The run's failure latch."""
        assert self._membership is not None
        return self._membership.latch

    @property
    def listener(self) -> Listener | None:
        """Rank 0's listener; None elsewhere or if rank 0 is alone."""
        assert self._membership is not None
        return self._membership.listener

    @property
    def membership(self) -> Membership:
        """This rank's part in the run."""
        assert self._membership is not None
        return self._membership

    def join(self, invitation: Invitation) -> None:
        """Begins to join a run that is under way."""
        self._is_guest = invitation.rank is None
        try:
            self.membership.join(invitation)
        except (HandshakeError, ChannelClosedError) as error:
            say(self._ranks.global_rank, f"cannot join the run: {error}")
            raise SystemExit(1) from error
        _prepare_exit()

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The ranks in the run, on rank 0, if they may have changed; None otherwise."""
        evictions = self.membership.evictions
        return None if evictions is None else evictions.roster.living

    @property
    def admission(self) -> Admission | None:
        """Takes in ranks that join, on rank 0; None elsewhere."""
        return self.membership.admission

    @property
    def on_lost(self) -> OnLost | None:
        """Told on rank 0 which worker's connection was lost; None where that ends the run."""
        evictions = self.membership.evictions
        return None if evictions is None else evictions.lose_connection

    def on_eviction(self, step: Callable[[int, str], str | None]) -> None:
        """Has something done on rank 0 when a rank is out, before the others hear of it; see `Evictions`."""
        if self.membership.evictions is not None:
            self.membership.evictions.before.append(step)

    def begin_training(self) -> None:
        """From here on a rank that is lost does not end a run that is to go on without it."""
        membership = self.membership
        evictions, address = membership.evictions, membership.address
        announce_training()
        if membership.meeting is None or address is None:
            return
        if evictions is not None and not evictions.under_way:
            evictions.under_way = True
            if self.resilience.join_file is not None:
                leave_invitation(address, Path(self.resilience.join_file))
        if not self._is_guest and self._local_rank(membership.rank) == 0:
            self.launcher.serve(address, membership.launchers)

    def end_training(self) -> None:
        """Until here."""
        if self._membership is not None and self._membership.evictions is not None:
            self._membership.evictions.under_way = False

    def share(self, address: str, broadcast: Callable[[str], str]) -> str:
        """Gives every rank the address of another listener of this run; see `Membership.share`."""
        assert self._membership is not None
        return self._membership.share(address, broadcast)

    @property
    def _forks(self) -> bool:
        """Whether processes beside this rank's are forks of it, which is one itself and uses no device yet."""
        is_forked = isinstance(self.launcher, ProcessLauncher) and self.launcher.start_method == "fork"
        uses_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return is_forked and not uses_gpu

    def start_holder_process(self) -> None:
        """Starts the holder's own process, which imports while the ranks find each other."""
        self.holder_process = HolderProcess(forks=self._forks)

    def start_shard_processes(self, shards: int) -> None:
        """Starts a process for each of the holder's shards but the first."""
        self.shard_processes = [ShardProcess(shard, forks=self._forks) for shard in range(1, shards)]

    def start_shard_servers(self, shards: Sequence[int]) -> None:
        """Starts a process for each of these shards, which rank 0 and all workers reach over the network."""
        self.shard_servers = [ShardServerProcess(shard, self._ranks.global_rank, forks=self._forks) for shard in shards]

    def end_holder_processes(self) -> None:
        """Ends the holder's own process, or those of its shards, if there are any."""
        process, self.holder_process = self.holder_process, None
        if process is not None:
            process.end()
        shards, self.shard_processes = self.shard_processes, []
        for shard in shards:
            shard.end()
        let_go, self.let_go_of_shards = self.let_go_of_shards, _do_nothing
        let_go()
        self._end_shard_servers(waits=True)

    def _end_shard_servers(self, waits: bool) -> None:
        servers, self.shard_servers = self.shard_servers, []
        for server in servers:
            server.end(waits)

    def meet(self, broadcast: Callable[[str], str], gather: Callable[[str], list[str]]) -> None:
        """Ties the ranks together, once they have a process group; a collective call."""
        environment = self._ranks.cluster_environment
        assert self._membership is not None and environment is not None
        # An evaluation has nothing to go on with: each rank has its share.
        resilience = self.resilience if self._ranks.is_fitting else Resilience()
        self._membership.meet(self._ranks.world_size, environment.main_address, broadcast, gather, resilience)
        if self._ranks.owner is None:
            _prepare_exit()

    @contextmanager
    def impatience(self) -> Iterator[None]:
        """Says what is being waited for if the ranks do not find each other soon; they give up after `timeout`."""
        environment = self._ranks.cluster_environment
        assert environment is not None
        hint = self.launcher.describe_start(self._ranks.num_nodes)
        timer = threading.Timer(
            _PATIENCE_S,
            lambda: log.warning(
                "rank %d of %d has waited %.0f s for the others at %s:%d; %s",
                self._ranks.global_rank,
                self._ranks.world_size,
                _PATIENCE_S,
                environment.main_address,
                environment.main_port,
                hint,
            ),
        )
        timer.daemon = True
        timer.start()
        try:
            # A rendezvous is a call that no signal interrupts.
            with interruptible(self.launcher.interrupt):
                yield
        except RuntimeError as error:
            if (cause := describe_refused_peer(str(error), self._ranks.num_nodes)) is None:
                raise
            raise RuntimeError(f"The ranks cannot form a process group: {cause}.") from error
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
