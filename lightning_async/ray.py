"""The strategies for Ray Train: `RayAsyncAMSGradStrategy` and `RayAsyncStrategy`.

In the training function of a ``TorchTrainer``::

    from lightning_async.ray import RayAsyncAMSGradStrategy

    trainer = Trainer(strategy=RayAsyncAMSGradStrategy(), callbacks=[RayTrainReportCallback()], ...)
    trainer = prepare_trainer(trainer)

Ray starts the ranks, takes an error of each, and ends them; so nothing here does. A rank that fails raises its own
error, and the others raise `WorkerFailedError`, which names it.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

try:
    import ray.train
    import ray.train.torch
    import ray.util
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback
except ImportError as error:
    raise ImportError(f'lightning_async.ray needs Ray Train: pip install "ray[train]" ({error})') from None

from lightning_async.runtime.failure import WorkerFailedError
from lightning_async.strategies.amsgrad import AsyncAMSGradStrategy
from lightning_async.strategies.strategy import AsyncStrategy
from lightning_async.strategies.validation import is_ray_worker

__all__ = ["MidEpochReportCallback", "RayAsyncAMSGradStrategy", "RayAsyncStrategy"]


class _RayTrain:
    """Ray Train, as what owns a rank's process."""

    name = "Ray Train"

    def report(self, error: WorkerFailedError) -> None:
        """Tells Ray in place of the training thread; Ray has no public way to."""
        from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
        from ray.train.v2._internal.execution.context import get_train_context

        errors = get_train_context().execution_context.training_thread_runner.get_exception_queue()
        errors.put(UserExceptionWithTraceback(error, traceback_str=f"{type(error).__name__}: {error}"))


class _Environment(RayLightningEnvironment):
    @property
    @override
    def main_address(self) -> str:
        # Of rank 0's node, by which the others reach it; TorchConfig(init_method="tcp") sets no variable.
        return os.environ.get("MASTER_ADDR") or str(ray.util.get_node_ip_address())


class RayAsyncStrategy(AsyncStrategy, RayDDPStrategy):
    """`AsyncStrategy` in the training function of a ``TorchTrainer``.

    It takes the same arguments, but for those that say what becomes of a lost rank and how ranks are started: that is
    Ray's, and said with ``FailureConfig`` and ``ScalingConfig``.

    Raises:
        MisconfigurationException: if an argument has no meaning.
    """

    owner = _RayTrain()

    def __init__(self, **arguments: Any) -> None:
        _refuse_what_is_rays(type(self).__name__, arguments)
        super().__init__(**arguments)

    @property
    @override
    def num_processes(self) -> int:
        # The Trainer's devices are this worker's.
        return int(ray.train.get_context().get_local_world_size())

    @override
    def set_world_ranks(self) -> None:
        # What a Trainer asks first of the strategy that it has been given.
        if not is_ray_worker():
            kind = type(self).__name__
            raise MisconfigurationException(
                f"{kind} works in the training function that a ray.train.torch.TorchTrainer runs, and this is none. "
                f"Elsewhere take strategy=lightning_async.{kind.removeprefix('Ray')}(...)."
            )
        if not isinstance(self.cluster_environment, _Environment):
            # In the place of the Trainer's plugin, or of what it has found without one: Lightning's own, or SLURM's.
            self.cluster_environment = _Environment()
        super().set_world_ranks()


class RayAsyncAMSGradStrategy(RayAsyncStrategy, AsyncAMSGradStrategy):
    """`AsyncAMSGradStrategy` in the training function of a ``TorchTrainer``; see `RayAsyncStrategy`.

    Raises:
        MisconfigurationException: if an argument has no meaning.
    """


class MidEpochReportCallback(RayTrainReportCallback):
    """``RayTrainReportCallback`` that also reports after each validation in the middle of an epoch.

    With ``Trainer(val_check_interval=...)`` a run that Ray starts again goes on from there, with any number of ranks.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports metrics and a checkpoint, unless the epoch ends with this validation and does so itself."""
        fits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fits and not trainer.is_last_batch:
            self.on_train_epoch_end(trainer, pl_module)


def _refuse_what_is_rays(kind: str, arguments: dict[str, Any]) -> None:
    if arguments.get("on_worker_failure", "stop") != "stop":
        raise MisconfigurationException(
            f'{kind} cannot take on_worker_failure="continue": Ray ends all ranks when one ends. Let it start them '
            "again from the last checkpoint: RunConfig(failure_config=FailureConfig(max_failures=3))."
        )
    if arguments.get("start_method", "popen") != "popen":
        raise MisconfigurationException(f"{kind} cannot take start_method: Ray starts the ranks.")
    if arguments.get("process_group_backend") is not None:
        raise MisconfigurationException(
            f"{kind} cannot take process_group_backend: Ray forms the process group, with TorchConfig(backend=...)."
        )
