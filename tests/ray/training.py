"""The training function that the tests give to Ray, and what it leaves for them.

Every sample has a parameter of its own, from which SGD takes 1 each time that the sample is trained on: after a fit the
parameters say how often each sample has counted, whatever was lost and repeated on the way.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["EPOCHS", "SAMPLES", "Plan", "attempts", "counts", "train"]

SAMPLES, BATCH, EPOCHS = 240, 4, 2


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Args:
        folder: where it leaves what it has done.
        step_s: seconds of a batch on each rank, in turn.
        strategy: arguments of the strategy.
        prepared: whether the Trainer goes through prepare_trainer and has Ray's environment for a plugin.
        fault: what befalls a rank once, and is given to `strike`.
        fault_rank: which one.
        fault_batch: before which of its batches.
        stuck: whether the other ranks are then in something for ten minutes that nothing wakes.
        val_check_interval: see Trainer.
        goes_on: the name of a file in the folder without which a batch takes a second, so that the run does not end.
    """

    folder: str
    step_s: tuple[float, ...] = (0.0,)
    strategy: tuple[tuple[str, Any], ...] = ()
    prepared: bool = True
    fault: str = ""
    fault_rank: int = 1
    fault_batch: int = 10
    stuck: bool = False
    val_check_interval: float = 0.25
    goes_on: str = ""

    def as_config(self) -> dict[str, Any]:
        return {"plan": asdict(self)}


class Counting(LightningModule):
    def __init__(self, plan: Plan, rank: int) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(SAMPLES))
        self._plan, self._rank, self.batches = plan, rank, 0

    def training_step(self, batch: list[Tensor]) -> Tensor:
        plan = self._plan
        self.batches += 1
        if plan.goes_on and not (Path(plan.folder) / plan.goes_on).exists():
            time.sleep(1.0)
        time.sleep(plan.step_s[self._rank % len(plan.step_s)])
        once = Path(plan.folder, "struck")
        if plan.fault and self._rank == plan.fault_rank and self.batches == plan.fault_batch and not once.exists():
            once.touch()
            strike(plan.fault)
        if plan.stuck and once.exists():
            time.sleep(600.0)
        return self.trained[batch[0]].sum()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("trained", -self.trained.sum(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def strike(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise ValueError("a mistake of the user's")


class Notes(Callback):
    """Notes on rank 0 how an attempt begins."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        if trainer.is_global_zero:
            begins = {"ranks": trainer.world_size, "version": strategy.version, "epoch": trainer.current_epoch}
            (self._folder / f"attempt_{time.time_ns()}").write_text(json.dumps(begins))


def attempts(folder: Path) -> list[dict[str, int]]:
    """How each attempt has begun."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("attempt_*"))]


def counts(folder: Path) -> list[float]:
    """How often each sample has counted."""
    return list(json.loads((folder / "counts").read_text()))


def train(config: dict[str, Any]) -> None:
    """A training function for TorchTrainer."""
    import ray.train
    import torch.distributed as dist
    from ray.train.lightning import RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

    from lightning_async.ray import MidEpochReportCallback, RayAsyncStrategy

    plan = Plan(**config["plan"])
    rank = ray.train.get_context().get_world_rank()
    report = MidEpochReportCallback if plan.val_check_interval < 1 else RayTrainReportCallback
    module = Counting(plan, rank)
    group = dist.group.WORLD
    trainer = Trainer(
        max_epochs=EPOCHS,
        devices="auto",
        accelerator="auto",
        strategy=RayAsyncStrategy(**dict(plan.strategy)),
        plugins=[RayLightningEnvironment()] if plan.prepared else None,
        callbacks=[report(), Notes(plan.folder)],
        val_check_interval=plan.val_check_interval,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=plan.folder,
    )
    if plan.prepared:
        trainer = prepare_trainer(trainer)
    samples = TensorDataset(torch.arange(SAMPLES))
    loaders = DataLoader(samples, BATCH, shuffle=True), DataLoader(TensorDataset(torch.arange(8)), BATCH)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.fit(module, *loaders)
    else:
        with checkpoint.as_directory() as folder:
            trainer.fit(module, *loaders, ckpt_path=os.path.join(folder, report.CHECKPOINT_NAME))
    ends = {
        "batches": module.batches,
        "pid": os.getpid(),
        "group_is_rays": group is not None and dist.group.WORLD is group,
        "transport": trainer.strategy.configuration["transport"],
    }
    (Path(plan.folder) / f"rank_{rank}").write_text(json.dumps(ends))
    if rank == 0:
        (Path(plan.folder) / "counts").write_text(json.dumps((-module.trained.detach()).tolist()))
