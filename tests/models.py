"""Small modules and data for launched runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import AMSGrad

__all__ = ["LoggingClassifier", "Recorder", "TinyClassifier", "fork_trainer", "indexed_data"]


def indexed_data(samples: int = 64, features: int = 6) -> TensorDataset:
    """A separable two-class problem whose batches carry their samples' indices: ``(x, y, index)``."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, features, generator=generator)
    return TensorDataset(x, (x.sum(dim=1) > 0).long(), torch.arange(samples))


class TinyClassifier(LightningModule):
    """A two-layer network that remembers which samples it saw and how many batches it computed.

    Args:
        sleep_s: seconds that each rank sleeps in a training step; ranks past the end of the list do not sleep.
        lr: learning rate.

    Attributes:
        logs: whether it logs its loss, which takes Lightning a millisecond a step.
    """

    logs = False

    def __init__(self, sleep_s: tuple[float, ...] = (), lr: float = 1e-2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.sleep_s = sleep_s
        self.lr = lr
        self.seen: list[list[int]] = []
        self.batches = 0

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen[-1] += batch[2].tolist()
        self.batches += 1
        if self.global_rank < len(self.sleep_s):
            time.sleep(self.sleep_s[self.global_rank])
        loss = self.loss(batch)
        if self.logs:
            self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.parameters(), lr=self.lr)

    def flat_parameters(self) -> Tensor:
        """All parameters in one vector, copied."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters()]).clone()


class LoggingClassifier(TinyClassifier):
    """Logs its loss."""

    logs = True


class Recorder:
    """Keeps what the holder applied, in order; to be appended to ``strategy.observers``."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []

    def __call__(self, update: Any, tickets: tuple[int, ...]) -> None:
        self.updates.append(
            {
                "worker": update.push.worker,
                "version_read": update.push.version_read,
                "version": update.version,
                "staleness": update.staleness,
                "applied": update.applied,
                "tickets": tickets,
            }
        )


def fork_trainer(folder: Path, devices: int, strategy: Any = "async_amsgrad_fork", **arguments: Any) -> Trainer:
    """A quiet CPU trainer whose ranks are forked."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(**(defaults | arguments))


def loader(samples: int = 64, batch_size: int = 4, **arguments: Any) -> DataLoader[Any]:
    """A loader over `indexed_data`."""
    return DataLoader(indexed_data(samples), batch_size=batch_size, **arguments)
