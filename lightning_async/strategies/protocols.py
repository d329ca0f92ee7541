"""What the parts of a strategy need of the strategy, and what the launchers need of its parts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer

from lightning_async.exchange.auto import Choice
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.failure import RunFailure, WorkerFailedError
from lightning_async.runtime.roster import Resilience

__all__ = ["FitMonitor", "LaunchedStrategy", "ProcessOwner", "Ranks", "RunGuard"]

_T = TypeVar("_T")


class Ranks(Protocol):
    """Where this process stands among the run's ranks."""

    @property
    def global_rank(self) -> int:
        """This rank."""

    @property
    def world_size(self) -> int:
        """Number of ranks N."""

    @property
    def node_rank(self) -> int:
        """This host, among those of the run."""

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""

    @property
    def num_processes(self) -> int:
        """Number of ranks on each host."""

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Where the ranks find each other."""

    def set_world_ranks(self) -> None:
        """Takes this process's rank from the cluster environment."""


class RunGuard(Protocol):
    """What a launcher runs the trainer's function in, and tells of the ranks that it has started.

    Attributes:
        resilience: what becomes of a fit when a rank is lost.
    """

    resilience: Resilience

    @property
    def failure(self) -> RunFailure | None:
        """The first failure of the run, as far as this rank knows; None while there is none."""

    @property
    def goes_on(self) -> bool:
        """Whether a fit goes on without ranks that it loses."""

    def guard_run(self) -> AbstractContextManager[None]:
        """What the trainer's function runs in: no failure of any rank leaves another one waiting."""

    @property
    def is_out(self) -> bool:
        """Whether this rank has left a run, or was taken out of it, that goes on without it."""

    def report_failure(self, local_rank: int, code: int, start: int) -> None:
        """Tells this rank that the process of another one on this host has ended with an error.

        Args:
            local_rank: which one.
            code: its exit status.
            start: which start of that rank it was: 0 is the first.
        """


class ProcessOwner(Protocol):
    """An engine that starts the ranks' processes, takes an error of each, and ends them; Ray Train is one.

    Attributes:
        name: what a user calls it.
    """

    name: str

    def report(self, error: WorkerFailedError) -> None:
        """Takes the error with which this rank ends, where its own thread does not come back to raise it."""


class LaunchedStrategy(Ranks, Protocol):
    """A strategy, as its launcher sees it.

    Attributes:
        strategy_name: the name under which Lightning knows it.
        owner: the engine that this rank's process belongs to; None where it is the run's own.
        has_stepped: whether this rank has trained on a batch in this fit.
        stats: what the ranks' process gives to the one that has started them.
        choice: the same, of what "auto" has chosen.
    """

    strategy_name: str
    owner: ProcessOwner | None
    has_stepped: bool
    stats: RunStats
    choice: Choice | None

    @property
    def is_fitting(self) -> bool:
        """Whether the trainer fits, and does not only evaluate."""

    @property
    def is_told_to_end(self) -> bool:
        """Whether this rank has had a SIGTERM in this fit."""

    @property
    def takes_snapshots(self) -> bool:
        """Whether snapshots of a fit are written, which a job that is started again goes on from."""

    def break_off(self, error: BaseException) -> None:
        """Leaves what is known of a fit that ends with an exception; runs no collective, and raises nothing."""

    def refuse_before_launch(self, trainer: Trainer) -> None:
        """Refuses what is known to fail before there are ranks that would all say so.

        Raises:
            MisconfigurationException: if something is.
        """


class FitMonitor(Protocol):
    """What leaves something of a fit, such as `AsyncMonitor`."""

    def break_off(self, error: BaseException) -> None:
        """The fit ends with an exception on this rank, before anything is torn down; must run no collective."""

    def closing_line(self, broken_off: bool) -> str | None:
        """Where what was left is, for the last line under the run's table, on rank 0; None to say nothing yet."""
