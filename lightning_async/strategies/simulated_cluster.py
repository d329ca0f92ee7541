"""A cluster in one process: real gradients, virtual time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.data.streams import count_samples
from lightning_async.exchange import auto
from lightning_async.exchange.dial import Dial, GradientsPerUpdate, RunDial, policy_and_momentum
from lightning_async.exchange.options import ExchangeOptions
from lightning_async.holder.amsgrad import UnsupportedOptimizerError
from lightning_async.holder.barrier import StalenessBarrier
from lightning_async.holder.barrier_policies import OnStale
from lightning_async.holder.gradient_mean import Gathered
from lightning_async.holder.layout import FlatLayout, exchanged_parameters
from lightning_async.holder.rebuild import check_steppable
from lightning_async.holder.staleness import MaxStaleness, resolve_max_staleness
from lightning_async.loops.progress_bar import end_live_bars, say
from lightning_async.loops.trainer_state import is_optimizer, logger_prefix
from lightning_async.monitoring.loggers import writer_for
from lightning_async.monitoring.metrics import MetricsLogger
from lightning_async.monitoring.stats import RunStats
from lightning_async.monitoring.tables import printable
from lightning_async.policies.base import StalenessPolicy
from lightning_async.policies.momentum import MomentumCorrection
from lightning_async.policies.registry import describe_policy
from lightning_async.simulation.cluster import ExchangeTimes, Progress
from lightning_async.simulation.run import ClusterRun
from lightning_async.simulation.step_times import StepSpec, StepTimes
from lightning_async.simulation.summary import ROWS, cluster_table
from lightning_async.strategies.one_device import OneDeviceStrategy, check_memory
from lightning_async.strategies.optimizer_proxy import make_proxy, remove_proxy
from lightning_async.strategies.stops import Stops
from lightning_async.strategies.validation import (
    check_module,
    check_momentum,
    check_parameters,
    describe_gradient,
    refuse_finders,
)

__all__ = ["SimulatedClusterStrategy"]

_CHECKPOINT_KEY = "simulated_cluster"


class SimulatedClusterStrategy(OneDeviceStrategy):
    """Trains on one device as a cluster of N workers would, in virtual time: real gradients, the holder of a real run.

    Each batch goes to the worker that is the next to read in virtual time. Its gradient is computed at the parameters
    that the holder has then, and arrives after pull, step and push; until then other workers' gradients change the
    parameters. The same holder and staleness barrier as in ``AsyncStrategy`` decide who waits, what is dropped and when
    an update is made. The run is reproducible bit for bit; one worker is plain training with the same optimizer.

    ``gradients_per_update=N, max_staleness=0`` is DDP: each update waits for the slowest. ``gradients_per_update=N - b,
    max_staleness=0, on_stale="drop"`` is DDP with b backup workers: late gradients are dropped. As under
    `AsyncStrategy` no worker waits there for the next version: one that has contributed computes at the same version
    again, and that gradient counts only if it comes in time.

    Each batch, whichever worker computes it, is a step of the Trainer: an epoch has N times as many steps as under DDP
    with N ranks, and a schedule by steps must be N times as long. `trainer.estimated_stepping_batches` counts alike.

    Validation, checkpoints and the epoch's end are stops: what is under way arrives first, the clock goes on to the
    latest, and all workers begin together afterwards. So each stop costs virtual time, as in a real run, and a
    checkpoint is one. Between two batches hooks see the newest parameters.

    Memory: a gradient for each worker whose gradient may be under way. It is printed when fit begins.

    Checkpoints are those of training on one device, with the version, the virtual time and the numbers of steps drawn.

    ``trainer.strategy.stats`` has staleness, throughput and waiting in virtual seconds, `virtual_seconds` the time and
    `progress` how long each worker has computed and the holder worked. The ``async/`` metrics go to the loggers
    every ``log_every_n_steps`` batches and at the end; of the workers, the first 8 have metrics of their own.

    Args:
        step_seconds: for each worker what a batch takes: a number, a mapping ``{"mean": 0.2, "spread": 0.1,
            "distribution": "lognormal"}`` (or ``"normal"``, ``"uniform"``, ``"exponential"``), or a list of seconds to
            draw from; or the path of a recorded run, whose ranks' steps are drawn from. See `StepTimes.of`.
        workers: number of workers N, if it is not that of ``step_seconds``: these are then repeated.
        max_staleness: the bound, as `AsyncStrategy` takes it.
        on_stale: as `AsyncStrategy` takes it.
        gradients_per_update: as `AsyncStrategy` takes it.
        staleness_policy: as `AsyncStrategy` takes it.
        momentum_correction: as `AsyncStrategy` takes it.
        reject_nonfinite: as `AsyncStrategy` takes it.
        max_rejected_in_a_row: as `AsyncStrategy` takes it.
        push_seconds: a gradient's way to the holder.
        pull_seconds: the parameters' way to a worker.
        update_seconds: the holder's work for one gradient, in which it does nothing else.
        seed: of the steps, and of nothing else.
        summary: whether a table is printed at the end.
        accelerator: see `SingleDeviceStrategy`.
        checkpoint_io: see `SingleDeviceStrategy`.
        precision_plugin: see `SingleDeviceStrategy`.

    Raises:
        MisconfigurationException: if an argument has no meaning, more than one device or node is asked for, the
            gradients do not fit into the device's memory, or module or optimizer cannot be trained so.

    Examples:
        >>> SimulatedClusterStrategy(step_seconds=[1, 1, 1, 4], max_staleness=8).workers
        4
    """

    strategy_name = "simulated_cluster"

    def __init__(
        self,
        step_seconds: StepSpec,
        workers: int | None = None,
        max_staleness: MaxStaleness = "auto",
        on_stale: OnStale = "wait",
        gradients_per_update: GradientsPerUpdate = 1,
        staleness_policy: StalenessPolicy | str | None = None,
        momentum_correction: MomentumCorrection = None,
        reject_nonfinite: bool = True,
        max_rejected_in_a_row: int = 10,
        push_seconds: float = 0.0,
        pull_seconds: float = 0.0,
        update_seconds: float = 0.0,
        seed: int = 0,
        summary: bool = True,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        try:
            self._steps = StepTimes.of(step_seconds, workers, seed)
            self._times = ExchangeTimes(push_seconds, pull_seconds, update_seconds)
            # They know what their settings may be.
            self._asked_dial = Dial(gradients_per_update, staleness_policy)
            self._asked = ExchangeOptions(
                max_staleness,
                on_stale,
                staleness_policy=self._asked_dial.policy,
                momentum_correction=momentum_correction,
                reject_nonfinite=reject_nonfinite,
                max_rejected_in_a_row=max_rejected_in_a_row,
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        self._simulated = {
            "step_seconds": str(step_seconds),
            "push_seconds": push_seconds,
            "pull_seconds": pull_seconds,
            "update_seconds": update_seconds,
            "seed": seed,
        }
        self.summary = summary
        self._start_anew()
        # While a fit trains.
        self._run: ClusterRun | None = None
        self._undo = ExitStack()
        self._metrics: MetricsLogger | None = None
        self._has_pushed = False

    @property
    def workers(self) -> int:
        """Number of simulated workers N."""
        return self._steps.workers

    @property
    def configuration(self) -> dict[str, Any]:
        """The simulated cluster, ready for JSON."""
        options = self._options
        return {
            "strategy": type(self).__name__,
            "ranks": self.workers,
            "max_staleness": self._bound,
            "on_stale": options.on_stale,
            "batches": "shared",
            "gradients_per_update": options.gradients_per_update,
            "staleness_policy": describe_policy(options.staleness_policy),
            "momentum_correction": options.momentum_correction,
            **self._simulated,
            **self._dial.described,
        }

    @property
    def _options(self) -> ExchangeOptions:
        """How gradients become updates at present."""
        return self._dial.options

    @property
    def _bound(self) -> int | None:
        return resolve_max_staleness(self._options.max_staleness, self.workers, self._options.gradients_per_update)

    @property
    def version(self) -> int:
        """Updates made so far."""
        return self._version if self._run is None else self._run.version

    @property
    def virtual_seconds(self) -> float:
        """The virtual time: what the cluster's training takes, without validation."""
        return self.progress.now

    def _start_anew(
        self,
        progress: Progress | None = None,
        version: int = 0,
        gathered: Gathered | None = None,
        learned: Mapping[str, Any] | None = None,
    ) -> None:
        self._dial = RunDial(self._asked_dial, self._asked, self.workers, lambda: self.stats)
        self.progress = progress or Progress.beginning(self.workers)
        self.stats = RunStats(self.workers, self.progress.time)
        self._version, self._gathered, self._learned = version, gathered, learned
        self._batches = self._samples = 0

    # --- setting up ---------------------------------------------------------------------------------------------------

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        name, module = type(self).__name__, self._module
        refuse_finders(trainer, name)
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"{name} cannot train {type(module).__name__}, which steps its optimizers by hand "
                '(automatic_optimization=False). Let Lightning step one optimizer, or take strategy="async".'
            )
        if len(self.optimizers) != 1 or not is_optimizer(self.optimizers[0]):
            raise MisconfigurationException(
                f"{name} needs one optimizer. Return one from configure_optimizers of {type(module).__name__}."
            )
        self._check(self.optimizers[0])

    def _check(self, optimizer: Optimizer) -> None:
        try:
            check_steppable(optimizer)
            check_module(self._module)
            check_parameters(self._module, [optimizer])
        except UnsupportedOptimizerError as error:
            raise MisconfigurationException(str(error)) from None
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} cannot train this module: {error}.") from None

    @override
    def setup(self, trainer: Trainer) -> None:
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if is_fit:
            self._start_anew()
        super().setup(trainer)
        if is_fit:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
            stops = Stops(self._settle)
            # Before all others, which see the parameters of a stop then.
            callbacks.insert(0, stops)
            self._undo.callback(callbacks.remove, stops)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = self._module.trainer
        self._check_memory()
        writers = [writer_for(logger, logger_prefix) for logger in trainer.loggers]
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        self._metrics = MetricsLogger(self.stats, writers, every, self._more_metrics, ROWS) if writers else None
        if self._metrics is not None:
            self._metrics.configure(self.configuration)
            self._metrics.begin(trainer.global_step - 1)

    def _check_memory(self) -> None:
        try:
            layout = FlatLayout([exchanged_parameters(self.optimizers[0])])
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} cannot train this module: {error}.") from None
        count = self.workers
        if self._bound is not None and self._options.on_stale == "wait":
            count = min(count, (self._bound + 1) * self._options.gradients_per_update)
        subject, advice = type(self).__name__, "fewer workers, a smaller max_staleness or a smaller model"
        sizes = check_memory(subject, "gradients", count, layout.segment_bytes(0), self.root_device, advice)
        rank_zero_info(f"{subject} keeps {sizes} at most.")

    # --- one step -----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The strategy's hook is the last one: callbacks and module have done what they do to the newest parameters.
        super().on_train_batch_start(batch, batch_idx)
        run = self._ready_run()
        self._batches += 1
        self._samples += count_samples(batch)
        run.begin_batch()

    def _ready_run(self) -> ClusterRun:
        """The run; built when training begins, and built anew when a stop's hooks have changed the optimizer."""
        run, optimizer = self._run, self.optimizers[0]
        if run is not None and (run.is_training or run.owns(optimizer)):
            return run
        self._end_run_at_border()
        if run is not None and len(self.optimizers) != 1:
            raise MisconfigurationException(f"{type(self).__name__} needs one optimizer, not {len(self.optimizers)}.")
        self._check(optimizer)
        check_momentum(self._options, optimizer)
        make_proxy(optimizer, self._push, keeps_changes=lambda: False)
        self._undo.callback(remove_proxy, optimizer)
        options = self._options
        barrier = StalenessBarrier(self._bound, options.on_stale, self._version, options.gradients_per_update)
        try:
            policy, rule = policy_and_momentum(options, [optimizer], self.workers)
            limit = options.max_rejected_in_a_row if options.reject_nonfinite else None
            held = (self._gathered, policy, rule, self._learned, limit)
            run = ClusterRun(optimizer, barrier, self._steps, self._times, self.stats, self.progress, *held)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} cannot train this module: {error}.") from None
        self._run, self._gathered = run, None
        return run

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        run = self._run
        assert run is not None
        if not run.owns(optimizer):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} was replaced, or got other param groups, between two batches, while other "
                "workers' gradients are under way. Do it at a stop, for example in on_train_epoch_start or "
                "on_validation_end."
            )
        self._has_pushed, version = False, run.version
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if not self._has_pushed:
            # training_step returned None, or the gradient scaler found an infinity.
            run.skip(self._batches)
        self._batches = self._samples = 0
        trainer = self._module.trainer
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        step = trainer.global_step + 1
        if self._metrics is not None and every > 0 and step % every == 0:
            self._metrics.log(run.version, step - 1, trainer.current_epoch)
        if run.version > version:
            # In lock step everyone has arrived where a version is made.
            self._choose_if_due(trainer)
        return output

    def _choose_if_due(self, trainer: Trainer) -> None:
        """Lets "auto" choose, at a stop, once each worker has made the steps that it measures."""
        batches = auto.WARM_UP_STEPS * self.workers * trainer.accumulate_grad_batches
        if self._dial.steps_to_measure is None or sum(self.progress.steps) < batches:
            return
        self._dial.choice = self._dial.choose(self._times.update)
        if self._dial.notice is None:
            return
        say(trainer, self._dial.notice)
        self._settle()
        self._end_run_at_border()
        self._dial.begin_at(self._version)
        if self._metrics is not None:
            self._metrics.configure(self.configuration)

    def _push(self, optimizer: Optimizer) -> None:
        assert self._run is not None
        gradients = [parameter.grad for parameter in exchanged_parameters(optimizer)]
        for parameter, gradient in zip(exchanged_parameters(optimizer), gradients, strict=True):
            if gradient is not None and gradient.layout is not torch.strided:
                raise MisconfigurationException(describe_gradient(self._module, parameter))
        if any(gradient is not None for gradient in gradients):
            self._run.push(self._batches, self._samples)
            self._has_pushed = True

    def _more_metrics(self) -> dict[str, float]:
        return {"async/virtual_seconds": self.progress.now, "async/holder_load": self.progress.load}

    # --- stops --------------------------------------------------------------------------------------------------------

    def _settle(self, epoch_is_over: bool = False) -> None:
        run = self._run
        if run is None:
            return
        trainer = self._module.trainer
        if epoch_is_over:
            # `on_train_batch_start` has returned -1, or the data are fewer than they said.
            run.abandon()
            self._batches = self._samples = 0
        over = trainer.should_stop or trainer.max_steps == trainer.global_step
        run.settle(is_last=epoch_is_over or trainer.is_last_batch or over)
        if epoch_is_over:
            # Where a checkpoint at the last batch was a stop already.
            run.complete()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        # A checkpoint's first part.
        self._settle()
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        gathered, learned = (None, None) if self._run is None else (self._run.gathered(), self._run.learned())
        checkpoint[_CHECKPOINT_KEY] = {
            "version": self.version,
            "progress": self.progress.as_dict(),
            **({} if gathered is None else {"gathered": asdict(gathered)}),
            **({} if learned is None else {"policy": dict(learned)}),
            **self._dial.state(),
        }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        saved = checkpoint.get(_CHECKPOINT_KEY)
        if saved is None:
            return
        progress = Progress(**saved["progress"])
        if len(progress.steps) != self.workers:
            raise MisconfigurationException(
                f"The checkpoint is of a simulated cluster of {len(progress.steps)} workers, and this one has "
                f"{self.workers}. Take as many, or begin anew with its weights only."
            )
        gathered = Gathered(**saved["gathered"]) if "gathered" in saved else None
        self._start_anew(progress, saved["version"], gathered, saved.get("policy"))
        self._dial.load(saved)

    # --- the end ------------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        trainer = self._module.trainer
        if self._metrics is not None:
            self._metrics.finish(self.version, max(0, trainer.global_step - 1), trainer.current_epoch)
        if self._dial.unfinished is not None:
            say(trainer, self._dial.unfinished)
        if self.summary and self.stats.updates:
            end_live_bars(trainer)
            width = shutil.get_terminal_size().columns
            print(printable(cluster_table(self.stats, self.progress, self.version, width)), flush=True)

    @override
    def teardown(self) -> None:
        if self._run is not None:
            self._version = self._run.version
            self._end_run()
        with self._undo.pop_all():
            self._metrics = None
        super().teardown()

    def _end_run_at_border(self) -> None:
        """Ends the run between two versions; another one goes on from there."""
        run = self._run
        if run is not None:
            # Gradients that wait for more are of the parameters, the optimizer and the rules that were there.
            run.complete()
            self._version, self._gathered, self._learned = run.version, None, run.learned()
            self._end_run()

    def _end_run(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.release()
