"""Scripts that start their ranks on a GPU as a user's do: interpreters, spawned processes, compiled networks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import card
from tests.launch import ENVIRONMENT, launch

pytestmark = [
    pytest.mark.skipif(card.GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.timeout(100),
]

SCRIPT = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from torch import nn

from lightning_async import AMSGrad, AsyncAMSGradStrategy, AsyncMonitor
from tests.gpu import card
from tests.launch import report
from tests.models import TinyClassifier, fork_trainer, loader

start_method, way = sys.argv[1:]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x):
        return self.layers(x)


class Module(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.net = Network()
        if way == "compiled":
            self.net.compile(backend="aot_eager" if card.STANDS_IN else "inductor")

    def configure_optimizers(self):
        return AMSGrad(self.parameters(), lr=1e-2)

    def on_train_end(self):
        report(
            Path.cwd(),
            self.global_rank,
            parameters=self.flat_parameters().cpu(),
            device=str(self.device),
            batches=self.batches,
            version=self.trainer.strategy.version,
            loss=float(self.trainer.callback_metrics["val_loss"]),
        )

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


if __name__ == "__main__":
    seed_everything(1, verbose=False)
    more = {"gradients_per_update": 2} if way == "mean" else {}
    strategy = AsyncAMSGradStrategy(parallel_devices=card.devices(2, False), start_method=start_method, **more)
    arguments = {"precision": "16-mixed"} if way == "mixed" and not card.STANDS_IN else {}
    trainer = fork_trainer(
        Path.cwd(), 1, strategy, accelerator=card.ACCELERATOR, max_epochs=2, callbacks=[AsyncMonitor()], **arguments
    )
    module = Module()
    trainer.fit(module, loader(96), loader(24))
    trainer.save_checkpoint("after.ckpt")
    trainer.validate(module, loader(24))
"""


@pytest.mark.parametrize(
    ("start_method", "way"),
    [("popen", "plain"), ("popen", "mixed"), ("popen", "mean"), ("spawn", "plain"), ("popen", "compiled")],
)
def test_a_script_trains_validates_and_saves_on_ranks_that_share_a_gpu(
    tmp_path: Path, start_method: str, way: str
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py", start_method, way]

    run = launch(lambda folder: os.execve(command[0], command, os.environ | ENVIRONMENT), tmp_path, timeout_s=75.0)

    assert run.returncode == 0, run.output
    first, second = run.reports()
    assert first["device"] == second["device"] == str(card.FIRST)
    assert first["batches"] + second["batches"] == 48
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["loss"] == second["loss"]
    assert first["version"] == second["version"] == (24 if way == "mean" else 48)
    saved = torch.load(tmp_path / "after.ckpt", weights_only=False)
    assert {value.device.type for value in saved["state_dict"].values()} == {"cpu" if card.STANDS_IN else "cuda"}
