"""Trainings in a simulated cluster, small enough to be repeated by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_async import AMSGrad, SimulatedClusterStrategy
from tests.models import fork_trainer, indexed_data
from tests.remembering import Make, Remembering

BATCHES = 30
MAKE: dict[str, Make] = {
    "AMSGrad": lambda params: AMSGrad(params, lr=1e-2, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}


def batches(count: int = BATCHES) -> DataLoader[Any]:
    return DataLoader(indexed_data(count * 4), batch_size=4)


class Module(Remembering):
    def __init__(self, make: Make = MAKE["SGD"]) -> None:
        super().__init__(make, period=8)


def make_module(kind: type[Module] = Module, **arguments: Any) -> Module:
    seed_everything(5, verbose=False)
    return kind(**arguments)


def cluster(step_seconds: Any, **arguments: Any) -> SimulatedClusterStrategy:
    return SimulatedClusterStrategy(step_seconds, **({"summary": False} | arguments))


def fit(folder: Path, module: LightningModule, strategy: Any, **arguments: Any) -> Trainer:
    ckpt_path = arguments.pop("ckpt_path", None)
    validation = arguments.pop("validation", None)
    trainer = fork_trainer(folder, 1, strategy, **({"max_epochs": 2} | arguments))
    trainer.fit(module, batches(), validation, ckpt_path=ckpt_path)
    return trainer


def resumed(tmp_path: Path, checkpoint: str, make: Callable[[], Any], **arguments: Any) -> tuple[Module, Any]:
    warnings.filterwarnings("ignore", ".*The dirpath has changed")
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    module = make_module(make=MAKE["AMSGrad"])
    trainer = fit(tmp_path, module, make(), ckpt_path=tmp_path / "all" / checkpoint, **arguments)
    return module, trainer.strategy
