"""Lightning's face of the package: the strategy. Its hooks delegate to the parts of a run and of a fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.data.shared_loader import share_loader, walks_one_order
from lightning_async.exchange.auto import Choice
from lightning_async.exchange.dial import Dial, GradientsPerUpdate, RunDial
from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import (
    Batches,
    ExchangeOptions,
    HolderDevice,
    HolderPlace,
    HolderThreads,
    MaxStaleness,
    MomentumCorrection,
    OnStale,
    StalenessPolicy,
    Transport,
    WireDtype,
)
from lightning_async.exchange.service import UpdateObserver
from lightning_async.exchange.worker import Worker
from lightning_async.holder.amsgrad import UnsupportedOptimizerError
from lightning_async.holder.rebuild import check_steppable
from lightning_async.loops import trainer_state
from lightning_async.loops.installation import InstalledLoops, install
from lightning_async.loops.progress_bar import say
from lightning_async.monitoring.stats import RunStats
from lightning_async.runtime.admission import Invitation
from lightning_async.runtime.attempts import keeps_its_store
from lightning_async.runtime.cores import holder_threads as threads_beside_training
from lightning_async.runtime.cores import usable_cores
from lightning_async.runtime.elastic import is_supervised
from lightning_async.runtime.failure import RunFailure
from lightning_async.runtime.membership import Membership
from lightning_async.runtime.process_groups import breakable, form_default_group, open_exchange_group
from lightning_async.runtime.roster import OnWorkerFailure, Resilience
from lightning_async.shards.spread import shards_of_host
from lightning_async.strategies.checkpoint_io import WholeFileIO
from lightning_async.strategies.checkpointing import CHECKPOINT_KEY
from lightning_async.strategies.collectives import PhasedCollectives
from lightning_async.strategies.ending import FitEnding, do_each
from lightning_async.strategies.fit import Fit, set_up_fit
from lightning_async.strategies.gradient_exchange import ExchangeContext
from lightning_async.strategies.module_wrapper import ModuleWrapper, call_directly
from lightning_async.strategies.new_folders import NewFolders, log_folders
from lightning_async.strategies.notices import start_notices
from lightning_async.strategies.optimizer_proxy import bare_state, make_proxy, remove_proxy, with_own_state
from lightning_async.strategies.protocols import FitMonitor, ProcessOwner
from lightning_async.strategies.registration import register
from lightning_async.strategies.resolved import Resolved, describe_run
from lightning_async.strategies.signals import Signals
from lightning_async.strategies.snapshots import SnapshotPlace, Snapshots
from lightning_async.strategies.supervisor import RunSupervisor, StartMethod
from lightning_async.strategies.validation import (
    check_module,
    check_momentum,
    refuse_beside_spread,
    refuse_finders,
    refuse_options,
    refuse_sync_batchnorm,
)

__all__ = ["AsyncStrategy"]

# A run that has failed is over in a few seconds.
_LAST_SNAPSHOT_S = 2.0


class AsyncStrategy(PhasedCollectives):
    """Asynchronous data-parallel training with a holder on rank 0 and bounded staleness, for any torch optimizer.

    Each rank computes gradients on its own batches and pushes them to rank 0, which applies them one by one in the
    order of arrival and answers with fresh parameters. Nobody waits for the slowest rank. Trainer arguments keep the
    meaning that they have under DDP.

    Rank 0 steps the optimizer that ``configure_optimizers`` returns. `AsyncAMSGradStrategy` is the special case that
    insists on AMSGrad, which is what the theory of asynchronous adaptive methods is about.

    Args:
        max_staleness: the bound τ: no gradient is applied after more than this many updates since its parameters were
            read. ``"auto"`` is four per rank, 0 is serial training, None sets no bound.
        on_stale: ``"wait"`` holds an update back where it would make another rank's gradient too stale; ``"drop"``
            waits for nobody and discards gradients that are too stale.
        batches: ``"shared"`` gives the next batch to whichever rank asks, so a fast rank computes more of them;
            ``"sharded"`` gives every rank an equal share. Either way an epoch covers every sample once.
        transport: how gradients and parameters travel. ``"auto"`` uses shared memory for ranks on rank 0's host and
            TCP for the others, and NCCL between GPUs; ``"shm"``, ``"tcp"`` and ``"nccl"`` insist on one.
        worker_timeout: seconds without a sign of life after which a rank counts as lost and the run ends. A link that
            is cut for less is waited for, and a payload takes as long as its bytes move.
        overlap: computes a rank's next batch while its push and pull are under way, at parameters that are one step of
            that rank older. Worth it where the exchange takes long beside a step; see docs/benchmarks.md.
        wire_dtype: what gradients are rounded to on their way across a network: ``"fp32"``, ``"bf16"``, ``"fp16"``
            (which clamps to ±65,504) or ``"int8"`` (a scale for each 256 values; what rounding loses is sent with the
            next gradients). The holder's state stays in float32; shared memory moves nothing.
        parameter_wire_dtype: the same for parameters; ``"int8"`` sends the difference to what a rank has.
        summary: whether rank 0 prints a short table at the end of fit: what each rank did, how stale its gradients
            were, and what to make of it.
        holder_device: where the parameters and AMSGrad's state live: ``"cpu"`` is rank 0's host, ``"cuda"`` its GPU,
            ``"auto"`` its GPU if NCCL reaches every other rank, else its host.
        holder: whether updates are made by a thread of rank 0's process or by a ``"process"`` of their own,
            which leaves rank 0 to its training; worth it where that spends its time in Python, see docs/benchmarks.md.
        holder_threads: how many threads go over the memory of a model of at least a million parameters when the holder
            on rank 0's host updates and copies it. ``"auto"`` is as many as training leaves cores of that host, 8 at
            most. The bits are the same with any number. One thread steps optimizers other than AMSGrad, Adam and AdamW.
        holder_shards: in how many parts the holder is: the first in rank 0's process, each other one in a process of
            its own: on that host, or with ``num_nodes`` above 1 (or ``transport="tcp"``) on all hosts in turn. All
            apply the same gradients in the same order, so the bits are those of one part. Worth it where ranks wait
            for a large model's update or for rank 0's link; see docs/tuning.md.
        gradients_per_update: how many gradients rank 0 averages into one update, K. 1 is the paper's method; the number
            of ranks with ``max_staleness=0`` is DDP; what lies between takes larger learning rates than 1 and waits
            less than DDP. Gradients are weighted by their samples. ``"auto"`` takes DDP's learning rate and momentum:
            it begins as DDP does, measures the ranks' steps, and stays with DDP where they are equal; else it goes on
            with half of the ranks and ``staleness_policy="from_ddp"``. It says once what it has chosen, and why.
        staleness_policy: what is done with a gradient because of its age: ``"plain"`` (nothing), ``"damping"``,
            ``"delay_adaptive"``, ``"rescaled"``, ``"ordered_momentum"``, ``"look_ahead"``, ``"from_ddp"``, or
            a `StalenessPolicy`; None is ``"plain"``, or what ``gradients_per_update="auto"`` chooses.
        momentum_correction: what the holder multiplies β1, or ``momentum``, by when it steps; ``"auto"`` takes away
            what asynchrony itself adds. Param groups, schedulers and checkpoints keep the user's values.
        on_worker_failure: what becomes of a fit when a rank is killed, lost or out of memory: ``"stop"`` ends it with
            an error that names the rank, as under DDP; ``"continue"`` goes on with the others, who compute its batches.
        min_ranks: with ``"continue"``, how many ranks must be left.
        max_restarts: with ``"continue"``, how often in a row a lost rank that was started from here is started again;
            it joins the run in the middle of an epoch, and once it has been in it for ten minutes it is counted anew.
        join_file: with ``"continue"``, a file in which rank 0 leaves what workers on any machine join the run with:
            ``lightning-async join FILE -- python train.py``. It has the run's token, and only its owner can read it.
        reject_nonfinite: whether a gradient with NaN or infinity is rejected: it is not applied and makes no step, its
            batches count as done, and the rank that has computed it is named and goes on with fresh parameters. False
            applies it, as DDP does.
        max_rejected_in_a_row: a rank whose gradients are rejected so often without a break fails.
        step_timeout: seconds that a rank may take for a step, from fresh parameters to the gradient; one that takes
            longer fails, whether or not it gives signs of life. None sets no limit.
        max_slowdown: how many times as long as before a rank's steps may take, by medians of ten; one that has become
            slower fails. None sets no limit.
        snapshot_every_s: seconds after which rank 0 writes the next snapshot of the run, an ordinary checkpoint, in the
            background; a job that torchrun or SLURM starts again goes on from it, and so does a fit of forked or
            spawned ranks whose rank 0 is lost, with ``on_worker_failure="continue"``. With ``holder="process"`` nothing
            that was applied is lost. None writes none.
        snapshot_path: its file; None is ``lightning_async/snapshot.ckpt`` in the Trainer's ``default_root_dir``.
        accelerator: see `DDPStrategy`.
        parallel_devices: see `DDPStrategy`.
        cluster_environment: see `DDPStrategy`.
        checkpoint_io: see `DDPStrategy`.
        precision_plugin: see `DDPStrategy`.
        process_group_backend: backend of the process group that is used between the asynchronous phases.
        timeout: time-out of that process group's collectives.
        start_method: how ranks are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    Raises:
        MisconfigurationException: if an argument has no meaning.
    """

    strategy_name = "async"
    owner: ProcessOwner | None = None
    _example_optimizer = "torch.optim.Adam(...), or any other of torch's,"

    def __init__(
        self,
        max_staleness: MaxStaleness = "auto",
        on_stale: OnStale = "wait",
        batches: Batches = "shared",
        transport: Transport = "auto",
        worker_timeout: float = 60.0,
        overlap: bool = False,
        wire_dtype: WireDtype = "fp32",
        parameter_wire_dtype: WireDtype = "fp32",
        summary: bool = True,
        holder_device: HolderDevice = "auto",
        holder: HolderPlace = "thread",
        holder_threads: HolderThreads = "auto",
        holder_shards: int = 1,
        gradients_per_update: GradientsPerUpdate = 1,
        staleness_policy: StalenessPolicy | str | None = None,
        momentum_correction: MomentumCorrection = None,
        on_worker_failure: OnWorkerFailure = "stop",
        min_ranks: int = 1,
        max_restarts: int = 3,
        join_file: str | Path | None = None,
        reject_nonfinite: bool = True,
        max_rejected_in_a_row: int = 10,
        step_timeout: float | None = None,
        max_slowdown: float | None = None,
        snapshot_every_s: float | None = None,
        snapshot_path: str | Path | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        try:
            self._snapshot_place = SnapshotPlace(snapshot_every_s, snapshot_path)
            self._resilience = Resilience(on_worker_failure, min_ranks, max_restarts, join_file)
            self._dial = Dial(gradients_per_update, staleness_policy)
            self._asked = ExchangeOptions(
                max_staleness=max_staleness,
                on_stale=on_stale,
                batches=batches,
                transport=transport,
                worker_timeout_s=worker_timeout,
                overlap=overlap,
                wire_dtype=wire_dtype,
                parameter_wire_dtype=parameter_wire_dtype,
                holder_device=holder_device,
                holder=holder,
                holder_threads=holder_threads,
                holder_shards=holder_shards,
                staleness_policy=self._dial.policy,
                momentum_correction=momentum_correction,
                reject_nonfinite=reject_nonfinite,
                max_rejected_in_a_row=max_rejected_in_a_row,
                step_timeout_s=step_timeout,
                max_slowdown=max_slowdown,
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        self.stats = RunStats(workers=0)
        # Called on rank 0 with every update and the tickets (batches) that it covers; see `Engine`.
        self.observers: list[UpdateObserver] = []
        # Told on every rank when a fit ends.
        self.monitors: list[FitMonitor] = []
        self.summary = summary
        self.has_stepped = False
        self._signals = Signals()
        self._supervisor: RunSupervisor | None = None
        # While a fit is under way: its loops, what undoes all changes, and its parts once they are set up.
        self._loops: InstalledLoops | None = None
        self._undo = ExitStack()
        # Of a rank that joins, until it trains.
        self._before_joining = ExitStack()
        self._fit: Fit | None = None
        self._has_one_train_loader = True
        self._resolved: Resolved | None = None
        self._snapshots: Snapshots | None = None
        # Of the script's fits, where what has started this process counts them.
        self._fit_number: int | None = None
        # Of a fit from its setup on, and of the last one.
        self._run_dial: RunDial | None = None
        self._ending: FitEnding | None = None
        self._saving_since_ns = 0
        # What a checkpoint notes that is saved outside of a fit: where the last one has ended.
        self._note: dict[str, Any] = {"version": 0}

    @property
    def options(self) -> ExchangeOptions:
        """How gradients are exchanged among the ranks that there are."""
        return (self._run_dial or self._begin_dial()).options

    def _begin_dial(self) -> RunDial:
        return RunDial(
            self._dial, self._asked, self.nominal_world_size, lambda: self.stats, lambda: len(self.optimizers) or 1
        )

    @property
    def choice(self) -> Choice | None:
        """What ``gradients_per_update="auto"`` has chosen in this fit, or the last one; None before that."""
        return None if self._run_dial is None else self._run_dial.choice

    @choice.setter
    def choice(self, choice: Choice | None) -> None:
        # In the process that has started the ranks.
        self._run_dial = self._begin_dial()
        self._run_dial.choice = choice

    # --- who and where -----------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version k of the parameters that this rank holds: updates applied by all ranks."""
        return int(self._note["version"]) if self._fit is None else self.worker.version

    @property
    def worker(self) -> Worker:
        """This rank's worker; exists during fit."""
        assert self._fit is not None
        return self._fit.exchange.worker

    @property
    def engine(self) -> Engine | None:
        """This rank's part of the exchange; None outside of fit."""
        return None if self._fit is None else self._fit.exchange.engine

    @property
    def failure(self) -> RunFailure | None:
        """The first failure of the run, as far as this rank knows; None while there is none."""
        return None if self._supervisor is None else self._supervisor.failure

    @property
    def membership(self) -> Membership:
        """This rank's part in the run that is under way."""
        assert self._supervisor is not None
        return self._supervisor.membership

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # While training all ranks walk one order and draw tickets from it; evaluation is sharded as under DDP.
        return {"num_replicas": 1, "rank": 0} if self._shares_loader else super().distributed_sampler_kwargs

    @property
    def _shares_loader(self) -> bool:
        """Whether the loader that Lightning processes now is one for all ranks."""
        return self.is_fitting and self._trainer.training and self._has_one_train_loader

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def is_fitting(self) -> bool:
        """Whether the trainer fits, and does not only evaluate."""
        return self._trainer.state.fn == TrainerFn.FITTING

    # --- starting the ranks ------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        if self._layer_sync is not None:
            refuse_sync_batchnorm(self.strategy_name)
        self._supervisor = RunSupervisor(self, self._start_method, self.options.worker_timeout_s, self._resilience)
        # Lightning calls what it needs of a launcher, whatever its class.
        launcher: Any = self._supervisor.launcher
        self._launcher = self._signals.launcher = launcher

    def refuse_before_launch(self, trainer: Trainer) -> None:
        """Refuses what is known to fail before there are ranks that would all say so.

        Args:
            trainer: the trainer, with the module that it is to train.

        Raises:
            MisconfigurationException: if something is.
        """
        refuse_finders(trainer, self.strategy_name)
        module = self.lightning_module
        if trainer.state.fn != TrainerFn.FITTING or module is None:
            return
        for options in self._dial.possible(self._asked, self.world_size):
            refuse_options(options, self.strategy_name, self.root_device, self.world_size)
            if options.spreads(self.world_size, self.num_nodes):
                refuse_beside_spread(
                    options,
                    self.strategy_name,
                    self.root_device,
                    measures=self._dial.is_measured(self.world_size, 1),
                    goes_on=self._resilience.goes_on,
                    is_owned=self.owner is not None,
                )
        try:
            check_module(module)
        except ValueError as error:
            raise MisconfigurationException(f"{self.strategy_name} cannot train this module: {error}.") from None

    @override
    def _get_process_group_backend(self) -> str:
        devices = self.parallel_devices or []
        if self._process_group_backend is None and len(set(devices)) < len(devices) and self.root_device.type == "cuda":
            # NCCL refuses a group in which two ranks have the same GPU.
            return "gloo"
        return super()._get_process_group_backend()

    @override
    def setup_environment(self) -> None:
        supervisor = self._supervisor
        assert supervisor is not None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != self.world_size:
            # Lightning would take the group that an earlier run with one rank has left for this run's.
            dist.destroy_process_group()
        if self.is_fitting and self.is_global_zero and self.world_size > 1:
            if self.options.holder == "process":
                supervisor.start_holder_process()
            if not self.options.spreads(self.world_size, self.num_nodes):
                supervisor.start_shard_processes(self.options.shards(self.world_size))
        if self.is_fitting and self.local_rank == 0 and self.options.spreads(self.world_size, self.num_nodes):
            shards = self.options.shards(self.world_size)
            supervisor.start_shard_servers(shards_of_host(shards, self.node_rank, self.num_nodes))
        self.meet_by(None)
        if (invitation := Invitation.of_this_process()) is not None and self.is_fitting:
            self._join(supervisor, invitation)
            return
        if self._resilience.goes_on and self.is_fitting and is_supervised():
            rank_zero_warn(
                'on_worker_failure="continue" has no effect under torchrun, whose agent ends all ranks when one ends. '
                "Start the script itself: it starts its ranks."
            )
        with supervisor.impatience(), breakable():
            super().setup_environment()
            open_exchange_group(self._timeout)
        supervisor.meet(super().broadcast, self.gather_objects)
        self._meet_by_way_of_rank_0(supervisor)

    @override
    def setup_distributed(self) -> None:
        environment = self.cluster_environment
        if keeps_its_store() and not dist.is_initialized() and environment is not None:
            # Lightning would have torch form it by what the ranks of an attempt before have left.
            self.set_world_ranks()
            store = dist.TCPStore(
                environment.main_address, environment.main_port, timeout=self._timeout or default_pg_timeout
            )
            device = None if self.root_device.type == "cpu" else self.root_device
            form_default_group(
                store, self.global_rank, self.world_size, self._get_process_group_backend(), self._timeout, device
            )
        super().setup_distributed()

    def _join(self, supervisor: RunSupervisor, invitation: Invitation) -> None:
        """Begins to join a run; until this rank trains its collectives are local, as in a batch."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        supervisor.join(invitation)
        self.joins, self._worker_rank = True, supervisor.membership.rank
        self._trainer.num_sanity_val_steps = 0
        self._before_joining.enter_context(self.phase.asynchronous())

    def _meet_others(self) -> None:
        """Meets the others from the next stop on; this rank has joined the run."""
        assert self._supervisor is not None
        supervisor = self._supervisor
        self._before_joining.close()
        self._meet_by_way_of_rank_0(supervisor)

    def _meet_by_way_of_rank_0(self, supervisor: RunSupervisor) -> None:
        self.meet_by(supervisor.membership.meeting, supervisor.membership.losses)

    # --- setting up a fit --------------------------------------------------------------------------------------------

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if self.is_fitting:
            self._run_dial = None
            self._signals.forget()
            if self.is_global_zero:
                assert self._supervisor is not None
                new_folders = NewFolders(log_folders(self._trainer.loggers), are_used=lambda: self.stats.updates > 0)
                self._supervisor.on_failure = new_folders.remove_empty
                self._undo.callback(new_folders.remove_empty_if_interrupted, self._trainer)
            self._snapshots = self._snapshot_place.open(self._trainer, self, lambda: self.joins, self._fit_number)
            self._loops = install(
                self._trainer,
                self.strategy_name,
                self,
                self.phase,
                self._signals,
                stats=lambda: self.stats,
                on_train_loaders=self._note_train_loaders,
                snapshots=None if self._snapshots is None else self._snapshots.start,
            )
            self._undo.callback(self._loops.remove)

    @override
    def configure_ddp(self) -> None:
        """Puts a wrapper in the place of DDP's; there is no all-reduce to hook into the module's backward."""
        assert self.lightning_module is not None
        self._forward_redirection: Any = call_directly
        self.model = ModuleWrapper(self.lightning_module)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if not any(map(trainer_state.is_optimizer, self.optimizers)):
            raise MisconfigurationException(
                f"{self.strategy_name} needs an optimizer. Return {self._example_optimizer} from configure_optimizers."
            )
        for optimizer in self.optimizers:
            self._take_optimizer(optimizer)

    def _take_optimizer(self, optimizer: Optimizer) -> None:
        self._accept_optimizer(optimizer)
        check_momentum(self.options, optimizer)
        make_proxy(optimizer, self._push, lambda: self.engine is not None and self.engine.shares_parameters)
        self._undo.callback(remove_proxy, optimizer)

    def _accept_optimizer(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer that rank 0 cannot step."""
        try:
            check_steppable(optimizer)
        except UnsupportedOptimizerError as error:
            raise MisconfigurationException(str(error)) from None

    @property
    @override
    def optimizers(self) -> list[Optimizer]:
        return super().optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        if self.phase.is_asynchronous and not self.joins:
            raise MisconfigurationException(
                "the optimizers were replaced between two batches, while the other ranks train with those of before. "
                "Replace them where the ranks meet, for example in on_train_epoch_start, on_validation_end or "
                "on_train_epoch_end: the new ones are in force from the next batch."
            )
        own = [each.optimizer if isinstance(each, LightningOptimizer) else each for each in optimizers]
        assign: Any = Strategy.optimizers.fset  # type: ignore[attr-defined]  # a property is a function to mypy
        assign(self, own)

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if not self.is_fitting:
            return
        assert self.lightning_module is not None and self._loops is not None and self._supervisor is not None
        self.stats = RunStats(self.world_size)
        for notice in start_notices(self.world_size, self.num_processes, usable_cores()):
            rank_zero_info(notice)
        self._run_dial = self._begin_dial()
        if self._run_dial.notice is not None:
            rank_zero_info(self._run_dial.notice)
        self._resolved, self.has_stepped = None, False
        context = ExchangeContext(
            name=self.strategy_name,
            module=self.lightning_module,
            dial=self._run_dial,
            rank=self._supervisor.membership.rank,
            world_size=self.nominal_world_size,
            device=self.root_device,
            collectives=self,
            meet=self._meet_at_holder,
            supervisor=self._supervisor,
            stats=self.stats,
            observers=self.observers,
            spare_threads=self._spare_threads(),
            num_nodes=self.num_nodes,
        )
        self._fit = set_up_fit(
            context,
            trainer,
            optimizers=lambda: self.optimizers,
            take=self._take_optimizer,
            gradients=trainer_state.optimizer_steps(trainer) * self.nominal_world_size,
            phase=self.phase,
            loops=self._loops,
            signals=self._signals,
            resolve=self._resolve,
            on_joined=self._meet_others,
            snapshots=self._snapshots if self.is_global_zero else None,
        )
        self._undo.callback(self._fit.by_hand.release)
        self._ending = FitEnding(
            trainer,
            self.stats,
            configuration=lambda: self.configuration,
            monitors=self.monitors,
            wants_table=lambda: self.summary,
            finish_metrics=self._fit.coordinator.finish_metrics,
        )

    def _spare_threads(self) -> int:
        """How many threads the holder may have beside this host's ranks."""
        if self.world_size == 1:
            # Nobody trains while the holder steps: torch's own threads do.
            return 1
        of_a_rank = torch.get_num_threads() if self.root_device.type == "cpu" else 1
        return threads_beside_training(usable_cores(), self.num_processes, of_a_rank)

    def _meet_at_holder(self, address: str) -> str:
        """Gives every rank the address that rank 0's holder takes workers in at."""
        assert self._supervisor is not None
        joining = self._supervisor.membership.joining
        return super().broadcast(address) if joining is None else joining.exchange.as_json()

    def _resolve(self, resolved: Resolved) -> dict[str, Any]:
        self._resolved = resolved
        return self.configuration

    def _note_train_loaders(self, count: int) -> None:
        self._has_one_train_loader = count == 1

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._shares_loader and walks_one_order(dataloader):
            share_loader(dataloader, self.nominal_world_size, self.worker_rank, trainer_state.run_seed())
        return dataloader

    # --- one step ----------------------------------------------------------------------------------------------------

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        by_hand = self._parts.by_hand
        with by_hand.stepping():
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if not by_hand.manual and self.worker.has_unreported_batches:
            # Nothing was pushed: training_step returned None, or the gradient scaler found an infinity.
            self.worker.skip()
        return output

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        self._parts.by_hand.before_backward(self.version)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._parts.by_hand.explaining():
            return super().backward(closure_loss, *args, **kwargs)

    def _push(self, optimizer: Optimizer) -> None:
        self._parts.exchange.push(optimizer)
        self.has_stepped = True

    @property
    def _parts(self) -> Fit:
        assert self._fit is not None
        return self._fit

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = WholeFileIO()
        elif isinstance(self._checkpoint_io, AsyncCheckpointIO):
            # Which keeps the one that it was given by the user, or here before.
            self._checkpoint_io.checkpoint_io = WholeFileIO()
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._saving_since_ns = time.monotonic_ns()
        state = super().lightning_module_state_dict()
        return state if self._fit is None else self._fit.checkpointing.module_state(state)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        own = getattr(optimizer, "_optimizer", optimizer)
        saved = None if self._fit is None else self._fit.checkpointing.optimizer_state(own)
        if saved is not None:
            return saved
        # Of other ranks it is not written, and would have to be fetched.
        return super().optimizer_state(own) if self.is_global_zero else bare_state(own)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        snapshots = self._snapshots if self._snapshots is not None and self._snapshots.is_taking else None
        owned, step, held = set[int](), 0, None
        if self._fit is not None:
            checkpointing = self._fit.checkpointing
            if snapshots is not None and (taken := checkpointing.snapshot_between_batches) is not None:
                owned, step, held = checkpointing.owned, taken[1], checkpointing.held(checkpoint)
            checkpointing.complete(checkpoint, self.version, self.nominal_world_size)
        else:
            checkpoint[CHECKPOINT_KEY] = {"world_size": self.nominal_world_size, **self._note}
        if snapshots is not None:
            snapshots.write(checkpoint, owned, step, held)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        if self._fit is not None and self.is_global_zero and self.worker.on_span is not None:
            self.worker.on_span("checkpoint", self._saving_since_ns, time.monotonic_ns())

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.joins:
            # The run that it joins is further.
            return
        # A callback may have given the optimizers the param groups of the checkpoint.
        self._parts.exchange.follow_user_code()
        self._parts.checkpointing.load(checkpoint, self.optimizers, self.nominal_world_size)

    # --- the end -----------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        fit = self._parts
        if not self.is_global_zero:
            # As under DDP, user code finds the state on every rank after fit.
            fit.exchange.engine.states.load()
        self.barrier("every rank has the optimizers' states")
        assert self._supervisor is not None
        self._supervisor.end_training()
        self._save_late()
        # The others wait for rank 0 in whatever comes next, and take it for lost after the time-out.
        self._finish_snapshots(min(30.0, self.options.worker_timeout_s / 2))
        if self._run_dial is not None and self._run_dial.unfinished is not None:
            say(self._trainer, self._run_dial.unfinished)
        assert self._ending is not None
        self._ending.finish()

    def break_off(self, error: BaseException) -> None:
        """Leaves what is known of a fit that ends with an exception; runs no collective, and raises nothing.

        Args:
            error: the exception.
        """
        if self._fit is not None and self._ending is not None:
            # A handler may have asked for a checkpoint before it has ended the fit.
            do_each([self._save_late, lambda: self._finish_snapshots(_LAST_SNAPSHOT_S)])
            self._ending.break_off(error)

    def count_fit(self, trainer: Trainer) -> None:
        """A fit is about to be launched from this process, which is none of the ranks."""
        self._fit_number = self._snapshot_place.count_fit(trainer)

    @property
    def is_told_to_end(self) -> bool:
        """Whether this rank has had a SIGTERM in this fit."""
        return self._signals.sigterm_received

    @property
    def takes_snapshots(self) -> bool:
        """Whether snapshots of a fit are written, which a job that is started again goes on from."""
        return self._snapshot_place.every_s is not None

    def _finish_snapshots(self, timeout_s: float) -> None:
        if self._snapshots is not None:
            self._snapshots.finish(timeout_s)

    def _save_late(self) -> None:
        """Saves what a signal's handler has asked for since the last batch; no collective."""
        if not self._signals.saves:
            return
        with nullcontext() if self.phase.is_asynchronous else self.phase.asynchronous():
            self._signals.save()

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Leaves the exception as it is: there is no reducer whose complaint would need explaining."""

    @override
    def teardown(self) -> None:
        # Whatever becomes of the exchange, Lightning, torchmetrics and what user code has are then as they were.
        self._before_joining.close()
        with self._undo.pop_all():
            fit, self._loops = self._fit, None
            if fit is not None:
                fit.coordinator.abandon_segment()
                self._note = fit.checkpointing.note(self.version, self.nominal_world_size)
                self._fit = None
                fit.exchange.close()
            if self._supervisor is not None:
                self._supervisor.end_holder_processes()
        self.model = self.lightning_module
        # It moves states to the host, which must not ask for those that are on rank 0.
        optimizers, self.optimizers = self.optimizers, with_own_state(self.optimizers)
        super().teardown()
        self.optimizers = optimizers

    # --- what the user sees ------------------------------------------------------------------------------------------

    @property
    def configuration(self) -> dict[str, Any]:
        """How this run exchanges gradients, ready for JSON: arguments, ranks, and what "auto" became once it trains."""
        dial = self._run_dial or self._begin_dial()
        described = describe_run(type(self).__name__, self.nominal_world_size, dial.options, self._resolved)
        return {**described, **dial.described, "requested": described["requested"] | dial.requested}

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        register(cls.__name__, cls.strategy_name, cls, strategy_registry)
