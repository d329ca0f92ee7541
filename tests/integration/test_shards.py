"""A fit with shards is the fit without them, bit for bit, whatever number of shards it is gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_async import AMSGrad, AsyncStrategy
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, indexed_data, loader

pytestmark = pytest.mark.timeout(120)


class Wide(TinyClassifier):
    """Parameters that shards cut, and a frozen one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.net = nn.Sequential(nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 19), nn.ReLU(), nn.Linear(19, 2))
        self.net[2].bias.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.parameters(), lr=1e-2, weight_decay=0.01)

    def on_train_end(self) -> None:
        self.trainer.save_checkpoint(self.path)


def test_a_fit_with_shards_is_the_fit_without_bit_for_bit_and_is_resumed_with_another_number(tmp_path: Path) -> None:
    def fit(shards: int, epochs: int, resumed: str | None = None) -> Path:
        seed_everything(3, verbose=False)
        # In lock step the order in which gradients come makes no difference.
        strategy = AsyncStrategy(
            start_method="fork", gradients_per_update=2, max_staleness=0, holder_shards=shards, summary=False
        )
        trainer = fork_trainer(tmp_path, 2, strategy, max_epochs=epochs)
        path = tmp_path / f"{shards}-{epochs}.ckpt"
        data = DataLoader(indexed_data(), batch_size=4)
        trainer.fit(Wide(path), data, loader(8), ckpt_path=resumed, weights_only=False)
        return path

    def script(folder: Path) -> None:
        whole = fit(shards=1, epochs=2)
        half = fit(shards=3, epochs=1)
        resumed = fit(shards=2, epochs=2, resumed=str(half))
        first, second = (torch.load(path, weights_only=False) for path in (whole, resumed))
        state, other = (one["optimizer_states"][0]["state"] for one in (first, second))
        report(
            folder,
            0,
            parameters=all(
                torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items()
            ),
            states=all(
                torch.equal(value, other[place][key]) for place, entry in state.items() for key, value in entry.items()
            ),
            versions=(first["async_amsgrad"]["version"], second["async_amsgrad"]["version"]),
            size=len(state),
        )

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    found = run.report(0)
    assert found["parameters"] and found["states"]
    assert found["versions"] == (16, 16) and found["size"] == 5
