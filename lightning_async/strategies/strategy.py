"""Lightning's face of the package: the strategy. Owns phases and state, computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Literal, TypeGuard

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_async.data.shared_loader import share_loader
from lightning_async.exchange.engine import Engine
from lightning_async.exchange.options import ExchangeOptions, WireDtype
from lightning_async.exchange.param_views import UnsupportedGradientError
from lightning_async.exchange.service import UpdateObserver
from lightning_async.holder.amsgrad import UnsupportedOptimizerError
from lightning_async.holder.rebuild import check_steppable
from lightning_async.holder.staleness import resolve_max_staleness
from lightning_async.loops import fit_loop as loops
from lightning_async.loops import trainer_state
from lightning_async.loops.buffer_sync import check_ignored
from lightning_async.loops.phase import Phase, keep_metrics_local, release_metrics
from lightning_async.monitoring.loggers import writer_for
from lightning_async.monitoring.stats import MetricsLogger, RunStats
from lightning_async.monitoring.summary import print_summary
from lightning_async.strategies.by_hand import ByHand
from lightning_async.strategies.coordinator import SegmentedRanks
from lightning_async.strategies.module_wrapper import ModuleWrapper, call_directly
from lightning_async.strategies.optimizer_proxy import (
    agree_on_optimizers,
    make_proxy,
    place_in,
    remove_proxy,
    with_own_state,
)
from lightning_async.strategies.registration import register
from lightning_async.strategies.validation import check_module, check_parameters, describe_gradient
from lightning_async.transport.devices import RankDevices, describe_device, place_holder

__all__ = ["AsyncStrategy"]


class AsyncStrategy(SegmentedRanks):
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
            Gloo for the others, and NCCL between GPUs; ``"shm"``, ``"gloo"`` and ``"nccl"`` insist on one.
        worker_timeout: seconds without a sign of life after which a rank counts as lost and the run ends.
        overlap: computes a rank's next batch while its push and pull are under way, at parameters that are one step of
            that rank older. Worth it where the exchange takes long beside a step; see docs/benchmarks.md.
        wire_dtype: what gradients are rounded to on their way across a network: ``"fp32"``, ``"bf16"`` or ``"fp16"``
            (which clamps to ±65,504). The holder's state stays in float32; shared memory moves nothing.
        parameter_wire_dtype: the same for parameters.
        summary: whether rank 0 prints a short table at the end of fit: what each rank did, how stale its gradients
            were, and what to make of it.
        holder_device: where the parameters and AMSGrad's state live: ``"cpu"`` is rank 0's host, ``"cuda"`` its GPU,
            ``"auto"`` its GPU if NCCL reaches every other rank, else its host.
        holder: whether updates are made by a thread of rank 0's process or by a ``"process"`` of their own,
            which leaves rank 0 to its training; worth it where that spends its time in Python, see docs/benchmarks.md.
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

    def __init__(
        self,
        max_staleness: int | Literal["auto"] | None = "auto",
        on_stale: Literal["wait", "drop"] = "wait",
        batches: Literal["shared", "sharded"] = "shared",
        transport: Literal["auto", "shm", "gloo", "nccl"] = "auto",
        worker_timeout: float = 60.0,
        overlap: bool = False,
        wire_dtype: WireDtype = "fp32",
        parameter_wire_dtype: WireDtype = "fp32",
        summary: bool = True,
        holder_device: Literal["auto", "cpu", "cuda"] = "auto",
        holder: Literal["thread", "process"] = "thread",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
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
            self.options = ExchangeOptions(
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
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.worker_timeout_s = worker_timeout
        self.stats = RunStats(workers=0)
        # Called on rank 0 with every update and the tickets (batches) that it covers; see `Engine`.
        self.observers: list[UpdateObserver] = []
        self.summary = summary
        # Whether the train data is one loader, which all ranks may share.
        self.has_one_train_loader = True

    # --- who and where -----------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # While training all ranks walk one order and draw tickets from it; evaluation is sharded as under DDP.
        training = self._trainer.state.fn == TrainerFn.FITTING and self._trainer.training
        if training and self.has_one_train_loader:
            return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    # --- setting up a fit --------------------------------------------------------------------------------------------

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if model.trainer.state.fn == TrainerFn.FITTING:
            loops.install(model.trainer)

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
                f"{self.strategy_name} needs an optimizer. Return lightning_async.AMSGrad(...) from "
                "configure_optimizers."
            )
        for optimizer in self.optimizers:
            self._take_optimizer(optimizer)

    def _take_optimizer(self, optimizer: Optimizer) -> None:
        self._accept_optimizer(optimizer)
        make_proxy(optimizer, self._push, lambda: self._engine is not None and self._engine.shares_parameters)

    def _accept_optimizer(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer that rank 0 cannot step."""
        try:
            check_steppable(optimizer)
        except UnsupportedOptimizerError as error:
            raise MisconfigurationException(str(error)) from error

    @property
    @override
    def _wants_holder_process(self) -> bool:
        return self._trainer.state.fn == TrainerFn.FITTING and self.options.holder == "process"

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        keep_metrics_local()
        self.share_module()
        self.sigterm_received = False
        self._epoch_order = self._resumed = None
        self._version = trainer_state.optimizer_steps(trainer) * self.world_size
        self.stats = RunStats(self.world_size)
        self._engine = self._make_engine()
        self.by_hand = ByHand(trainer, self.strategy_name, self._version)
        if self.is_global_zero and trainer.loggers:
            writers = [writer_for(logger, trainer_state.logger_prefix) for logger in trainer.loggers]
            self._metrics = MetricsLogger(self.stats, writers)
            self._metrics.configure(self.configuration)

    def _make_engine(self, predecessor: Engine | None = None) -> Engine:
        assert self.lightning_module is not None and self._membership is not None
        try:
            check_module(self.lightning_module)
            check_ignored(self.lightning_module, self.optimizers)
            check_parameters(self.lightning_module, self.optimizers)
            return Engine(
                rank=self.global_rank,
                world_size=self.world_size,
                optimizers=self.optimizers,
                options=self.options,
                latch=self._membership.latch,
                listener=self._membership.listener,
                stats=self.stats,
                observers=self.observers,
                version=self._version,
                meet=super().broadcast,
                predecessor=predecessor,
                devices=self._devices(),
                process=self._holder_process,
            )
        except ValueError as error:
            raise MisconfigurationException(f"{self.strategy_name} cannot train this module: {error}") from error

    def _follow_user_code(self) -> None:
        """Takes over what hooks between segments did to parameters, optimizers and their states; a collective call."""
        engine = self._engine
        assert engine is not None
        agree_on_optimizers(self.optimizers, engine, self.gather_objects)
        engine.load_parameters()
        if engine.owns(self.optimizers):
            engine.load_states()
        else:
            for optimizer in self.optimizers:
                if engine.place_of(optimizer) is None:
                    self._take_optimizer(optimizer)
            self._version = engine.worker.version
            engine.release_states(kept=self.optimizers)
            # Rank 0 must not shut the listener on a rank that is still on its way to this engine.
            self.barrier("optimizers or param groups have changed")
            engine.close()
            self._engine = self._make_engine(predecessor=engine)
            self.worker.on_span = engine.worker.on_span
            self.worker.tally = engine.worker.tally

    def _devices(self) -> RankDevices:
        """Where this rank computes and where the holder lives; a collective call if there are GPUs."""
        own, mine = self.root_device, describe_device(self.root_device)
        choice = "cpu" if self.options.holder == "process" else self.options.holder_device
        everyone = () if mine is None else self.gather_objects(mine)
        try:
            # Asked on every rank, so that all of them refuse what cannot be.
            return RankDevices(own, mine, place_holder(choice, self.options.transport, everyone))
        except ValueError as error:
            raise MisconfigurationException(f"{error}.") from error

    @override
    def process_dataloader(self, dataloader: object) -> object:
        trainer = self._trainer
        training = trainer.state.fn == TrainerFn.FITTING and trainer.training
        if training and self.has_one_train_loader and _walks_one_order(dataloader):
            share_loader(dataloader, self.world_size, self.global_rank, trainer_state.run_seed())
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
        with self._hand.stepping():
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._automatic and self.worker.has_unreported_batches:
            # Nothing was pushed: training_step returned None, or the gradient scaler found an infinity.
            self.worker.skip()
        return output

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        self._hand.before_backward(self.version)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._hand.explaining():
            return super().backward(closure_loss, *args, **kwargs)

    def _push(self, optimizer: Optimizer) -> None:
        assert self._engine is not None
        index = place_in(self._engine, optimizer)
        self._engine.states.check_untouched()
        self._hand.before_push(index, len(self.optimizers), self.version)
        try:
            self.worker.step(index)
        except UnsupportedGradientError as error:
            assert self.lightning_module is not None
            raise MisconfigurationException(describe_gradient(self.lightning_module, error.parameter)) from error
        self._hand.after_push()

    @override
    def enter_asynchronous_phase(self, tickets: int, equal_shares: bool = False) -> None:
        self._follow_user_code()
        super().enter_asynchronous_phase(tickets, equal_shares)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # A callback may have given the optimizers the param groups of the checkpoint.
        self._follow_user_code()
        super().load_optimizer_state_dict(checkpoint)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Leaves the exception as it is: there is no reducer whose complaint would need explaining."""

    @override
    def teardown(self) -> None:
        Phase.end_asynchronous()
        release_metrics()
        engine, self._engine = self._engine, None
        if self.by_hand is not None:
            self.by_hand.release()
        if engine is not None:
            self._version = engine.worker.version
            engine.release_states()
            engine.close()
            for optimizer in engine.optimizers:
                remove_proxy(optimizer)
        self._end_holder_process()
        self._metrics = None
        if self.lightning_module is not None and self.lightning_module._trainer is not None:
            loops.uninstall(self.lightning_module.trainer)
        self.model = self.lightning_module
        # It moves states to the host, which must not ask for those that are on rank 0.
        optimizers, self.optimizers = self.optimizers, with_own_state(self.optimizers)
        super().teardown()
        self.optimizers = optimizers

    # --- what the user sees ------------------------------------------------------------------------------------------

    def log_statistics(self, step: int) -> None:
        """Writes the ``async/`` metrics to the trainer's loggers, on rank 0."""
        if self._metrics is not None:
            assert self._engine is not None and self._engine.service is not None
            self._engine.service.settle()
            self._metrics.log(self.version, step, self._trainer.current_epoch)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        assert self._engine is not None
        if not self.is_global_zero:
            # As under DDP, user code finds the state on every rank after fit.
            self._engine.states.load()
        self.barrier("every rank has the optimizers' states")
        if self._metrics is not None:
            self._metrics.finish()
        if self.summary and self.is_global_zero:
            print_summary(self.configuration, self.stats)

    @property
    def configuration(self) -> dict[str, Any]:
        """How this run exchanges gradients: the strategy's arguments and the number of ranks; ready for JSON."""
        bound = resolve_max_staleness(self.options.max_staleness, self.world_size)
        return {
            "strategy": type(self).__name__,
            "ranks": self.world_size,
            **asdict(self.options),
            "max_staleness": bound,
        }

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        register(cls.__name__, cls.strategy_name, cls, strategy_registry)


def _walks_one_order(dataloader: object) -> TypeGuard[DataLoader[Any]]:
    """Whether Lightning has given the loader the sampler of `distributed_sampler_kwargs`: one order for all ranks."""
    if not isinstance(dataloader, DataLoader):
        return False
    samplers = (dataloader.sampler, getattr(dataloader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) and sampler.num_replicas == 1 for sampler in samplers)
