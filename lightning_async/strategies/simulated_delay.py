"""Stale gradients in one process: the paper's delay study, without a cluster."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async.holder.layout import all_parameters
from lightning_async.holder.types import Push, Update
from lightning_async.loops.trainer_state import logger_prefix
from lightning_async.monitoring.loggers import writer_for
from lightning_async.monitoring.metrics import MetricsLogger
from lightning_async.monitoring.stats import RunStats
from lightning_async.strategies.one_device import OneDeviceStrategy, check_memory

__all__ = ["Delays", "PastIterates", "SimulatedDelayStrategy"]

Distribution = Literal["uniform", "fixed", "geometric"]


class Delays:
    """Random delays that depend on the seed and the update's number only, so that a resumed run draws the same.

    Args:
        max_delay: the largest delay D.
        distribution: ``"uniform"``: 0, ..., D are equally likely; ``"fixed"``: always D; ``"geometric"``: the
            probability of d is proportional to q**d with q = D / (D + 2), so that short delays are likelier.
        seed: any whole number.

    Raises:
        ValueError: if an argument has no meaning.

    Examples:
        >>> delays = Delays(4, "uniform", seed=1)
        >>> [delays.draw(update) for update in range(8)] == [delays.draw(update) for update in range(8)]
        True
        >>> Delays(4, "fixed").draw(0)
        4
    """

    def __init__(self, max_delay: int, distribution: Distribution = "uniform", seed: int = 0) -> None:
        if isinstance(max_delay, bool) or not isinstance(max_delay, int) or max_delay < 0:
            raise ValueError(f"max_delay must be an int of at least 0, not {max_delay!r}.")
        if distribution not in ("uniform", "fixed", "geometric"):
            raise ValueError(f"distribution must be 'uniform', 'fixed' or 'geometric', not {distribution!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an int, not {seed!r}.")
        self.max_delay = max_delay
        self._seed = seed
        ratio = {"uniform": 1.0, "fixed": 0.0, "geometric": max_delay / (max_delay + 2)}[distribution]
        weights = [ratio**delay for delay in range(max_delay + 1)]
        self._cumulative = list(itertools.accumulate(weights[::-1] if distribution == "fixed" else weights))

    def draw(self, update: int) -> int:
        """The delay of update number ``update``."""
        # A text seeds through a hash, so that neighbouring updates have nothing to do with each other.
        generator = random.Random(f"{self._seed}:{update}")
        return generator.choices(range(self.max_delay + 1), cum_weights=self._cumulative)[0]


class PastIterates:
    """The parameters at the last D + 1 versions, in a ring of copies; the newest is the module's own.

    Args:
        parameters: the module's trained parameters.
        max_delay: D.

    Attributes:
        version: the present version: updates so far.
    """

    def __init__(self, parameters: list[Tensor], max_delay: int, version: int = 0) -> None:
        self.version = version
        self._oldest = version
        self._parameters = parameters
        self._copies: list[list[Tensor]] = [[] for _ in range(max_delay + 1)]
        self._is_away = False

    @torch.no_grad()
    def go_back(self, delay: int) -> int:
        """Notes the module's parameters as the present version's, then gives it those of ``delay`` versions ago.

        Returns:
            The delay, or the age of the oldest version that there is.
        """
        self.come_home()
        self._note(self.version)
        delay = min(delay, self.version - self._oldest)
        if delay > 0:
            torch._foreach_copy_(self._parameters, self._of(self.version - delay))
            self._is_away = True
        return delay

    @torch.no_grad()
    def come_home(self) -> None:
        """Gives the module its newest parameters."""
        if self._is_away:
            torch._foreach_copy_(self._parameters, self._of(self.version))
            self._is_away = False

    def _of(self, version: int) -> list[Tensor]:
        return self._copies[version % len(self._copies)]

    def _note(self, version: int) -> None:
        copies = self._of(version)
        if copies:
            torch._foreach_copy_(copies, self._parameters)
        else:
            copies += [parameter.detach().clone() for parameter in self._parameters]


class SimulatedDelayStrategy(OneDeviceStrategy):
    """Trains on one device with gradients that are as stale as an asynchronous run's: what does a delay cost?

    Each update's gradient is computed at the parameters of d updates ago, with d drawn anew from 0, ..., D, and applied
    to the newest ones by whatever optimizer ``configure_optimizers`` returns. In the first updates d is at most the
    number of updates made so far. Validation, checkpoints and hooks between batches see the newest parameters. With
    ``max_delay=0`` this is plain training on one device, bit for bit.

    With ``accumulate_grad_batches`` all batches of one update are computed at the same parameters. With manual
    optimization every optimizer's ``step`` is an update of its own, after which another delay is drawn. Buffers, such
    as batch norm's statistics, are never delayed.

    Memory: D + 1 copies of the trained parameters, on their device: (D + 1) x parameters x bytes of each. LeNet-5 with
    D = 400 takes 71 MB, ResNet-18 with D = 20 takes 939 MB. The size is printed when fit begins.

    Checkpoints are those of single-device training: the copies are not saved. After resuming, the history begins anew
    with the checkpoint's parameters, so delays are cut short in the first D updates, as at the start of a run; the
    delays drawn are those of the run that was not interrupted.

    `SimulatedClusterStrategy` has delays as a cluster makes them, from the times of steps and exchanges, with averaged
    gradients and a bound that is kept by waiting or dropping.

    ``trainer.strategy.stats`` has the delays that occurred (``staleness``), and the ``async/`` metrics go to
    the loggers every ``log_every_n_steps`` updates and at the end.

    Args:
        max_delay: the largest delay D, in updates.
        distribution: ``"uniform"``: 0, ..., D are equally likely; ``"fixed"``: always D; ``"geometric"``: the
            probability of d is proportional to (D / (D + 2))**d, so that short delays are likelier.
        seed: of the delays, and of nothing else.
        accelerator: see `SingleDeviceStrategy`.
        checkpoint_io: see `SingleDeviceStrategy`.
        precision_plugin: see `SingleDeviceStrategy`.

    Raises:
        MisconfigurationException: if an argument has no meaning, more than one device or node is asked for, the copies
            do not fit into the device's memory, or an optimizer evaluates its closure more than once a step.

    Examples:
        >>> SimulatedDelayStrategy(max_delay=20, distribution="geometric", seed=1).max_delay
        20
    """

    strategy_name = "simulated_delay"
    real_thing = 'strategy="async" for real delays'

    def __init__(
        self,
        max_delay: int,
        distribution: Distribution = "uniform",
        seed: int = 0,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        try:
            self._delays = Delays(max_delay, distribution, seed)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.max_delay = max_delay
        self._configuration = {
            "strategy": type(self).__name__,
            "max_delay": max_delay,
            "distribution": distribution,
            "seed": seed,
        }
        self.stats = RunStats(workers=1)
        self._iterates: PastIterates | None = None
        self._metrics: MetricsLogger | None = None
        self._delay = 0
        self._batches = 0

    # --- setting up ---------------------------------------------------------------------------------------------------

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            closure = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.get("closure")
            if self.max_delay > 0 and closure is not None and closure.default is inspect.Parameter.empty:
                raise MisconfigurationException(_several_closures(type(optimizer).__name__))

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = self._module.trainer
        parameters = [parameter for optimizer in self.optimizers for parameter in all_parameters(optimizer)]
        copy_bytes = sum(parameter.nbytes for parameter in parameters)
        advice = "a smaller max_delay or a smaller model"
        subject, count = f"max_delay={self.max_delay}", self.max_delay + 1
        sizes = check_memory(subject, "copies", count, copy_bytes, self.root_device, advice)
        self.stats = RunStats(workers=1)
        writers = [writer_for(logger, logger_prefix) for logger in trainer.loggers]
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        self._metrics = MetricsLogger(self.stats, writers, every) if writers else None
        if self._metrics is not None:
            self._metrics.configure(self._configuration)
            self._metrics.begin(trainer.global_step - 1)
        self.stats.start_segment()
        self._delay, self._batches = 0, 0
        if self.max_delay > 0:
            rank_zero_info(f"SimulatedDelayStrategy keeps {sizes}.")
            self._iterates = PastIterates(parameters, self.max_delay, version=trainer.global_step)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.stats.end_segment()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._module.trainer.training:
            self.stats.start_segment()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.stats.end_segment()
        if self._metrics is not None:
            version = self._module.trainer.global_step if self._iterates is None else self._iterates.version
            self._metrics.finish(version, version - 1, self._module.trainer.current_epoch)

    # --- one step -----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The strategy's hook is the last one: callbacks and module have seen the newest parameters.
        super().on_train_batch_start(batch, batch_idx)
        self._batches += 1
        self._go_back()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        automatic = self._module.automatic_optimization
        try:
            output = super().training_step(*args, **kwargs)
        except BaseException:
            self._come_home()
            raise
        if not automatic or output is None:
            self._come_home()
        return output

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._module.automatic_optimization:
            self._come_home()
        return loss

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        evaluated = False

        def evaluate_once_and_come_home() -> Any:
            nonlocal evaluated
            if evaluated and self.max_delay > 0:
                raise MisconfigurationException(_several_closures(type(optimizer).__name__))
            evaluated = True
            result = closure()
            self._come_home()
            return result

        output = super().optimizer_step(optimizer, evaluate_once_and_come_home, model, **kwargs)
        self._note_update()
        if not self._module.automatic_optimization:
            # The rest of the training step is another update's.
            self._go_back()
        return output

    @override
    def teardown(self) -> None:
        self._come_home()
        self._iterates = None
        self._metrics = None
        super().teardown()

    def _go_back(self) -> None:
        if self._iterates is not None:
            # The batches of one update draw the same.
            self._delay = self._iterates.go_back(self._delays.draw(self._iterates.version))

    def _come_home(self) -> None:
        if self._iterates is not None:
            self._iterates.come_home()

    def _note_update(self) -> None:
        trainer = self._module.trainer
        version = trainer.global_step + 1 if self._iterates is None else self._iterates.version + 1
        read = version - 1 - self._delay
        # Nobody hands out tickets here; what counts is how many batches there were.
        tickets = (range(self._batches),)
        push = Push(worker=0, optimizer=0, version_read=read, gradients=(), groups=(), tickets=tickets)
        self._batches = 0
        self.stats.record(Update(push, version, staleness=self._delay, applied=True, parked_s=0.0))
        if self._iterates is not None:
            self._iterates.version = version
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        if self._metrics is not None and every > 0 and version % every == 0:
            self._metrics.log(version, version - 1, trainer.current_epoch)


def _several_closures(name: str) -> str:
    return (
        f"SimulatedDelayStrategy cannot delay the gradients of {name}, which evaluates its closure more than once a "
        "step, at parameters of its own choice. Take an optimizer that evaluates it once, or max_delay=0."
    )
