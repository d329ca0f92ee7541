"""Buffers: each rank has its own while it trains; at each stop they are made the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compatibility.runs import Reporting, train


class Normalized(Reporting):
    """BatchNorm, and buffers that no checkpoint keeps; notes them before and at each stop."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("weighed", torch.zeros(2), persistent=False)
        self.register_buffer("counted", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.own: list[dict[str, Tensor]] = []
        self.common: list[dict[str, Tensor]] = []

    def copies(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.named_buffers()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.weighed += 1 + self.global_rank
        self.counted += 1
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last = self.copies()

    def on_validation_start(self) -> None:
        self.own.append(self.last)
        self.last = self.copies()
        self.common.append(self.last)

    def facts(self) -> dict[str, Any]:
        return {"own": self.own, "common": self.common, "saved": list(self.state_dict())}


@pytest.mark.compatibility("Buffers", "non-persistent buffers", note="As the others.")
@pytest.mark.compatibility("Buffers", "integer and boolean buffers", note="Rank 0's at each stop.")
@pytest.mark.compatibility(
    "Buffers",
    "BatchNorm's running statistics and other floating-point buffers",
    "differs",
    "Averaged over the ranks at each stop (validation, an epoch's end, the end of fit); "
    "DDP takes rank 0's before each forward.",
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_at_each_stop_buffers_are_the_mean_or_rank_0s(tmp_path: Path, batches: str) -> None:
    run = train(tmp_path, Normalized, {"batches": batches}, validation_samples=12, val_check_interval=0.5, max_epochs=2)

    ranks = run.reports()
    assert "weighed" not in ranks[0]["saved"]
    for stop in range(4):
        own = [rank["own"][stop] for rank in ranks]
        assert len({tuple(buffers["net.1.running_mean"].tolist()) for buffers in own}) > 1
        for rank in ranks:
            common = rank["common"][stop]
            assert set(common) == {
                *(f"net.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
                *("weighed", "counted"),
            }
            for name, buffer in common.items():
                if buffer.is_floating_point():
                    mean = torch.stack([buffers[name].double() for buffers in own]).mean(dim=0).float()
                    assert torch.equal(buffer, mean)
                else:
                    assert torch.equal(buffer, own[0][name])
