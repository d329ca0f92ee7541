"""`validate`, `test` and `predict` are DDP's: alone, and after a fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader

RANKS = 2


class Evaluated(TinyClassifier):
    """Measures over all ranks, and notes which samples each rank saw."""

    def __init__(self) -> None:
        super().__init__(sleep_s=(0.0, 0.004))
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.evaluated: dict[str, list[int]] = {"validate": [], "test": [], "predict": []}

    def evaluate(self, stage: str, batch: Any) -> None:
        self.evaluated[stage] += batch[2].tolist()
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", self.loss(batch), on_step=False, on_epoch=True, sync_dist=True)
        # A collective of the user's own is allowed here.
        assert self.all_gather(torch.ones(1)).shape == (RANKS, 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("validate", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.evaluated["predict"] += batch[2].tolist()
        return self.net(batch[0]).argmax(dim=1)

    def on_validation_end(self) -> None:
        report(Path.cwd(), self.global_rank, seen=self.evaluated["validate"])

    def on_test_end(self) -> None:
        report(Path.cwd(), self.global_rank, seen=self.evaluated["test"])

    def on_predict_end(self) -> None:
        report(Path.cwd(), self.global_rank, seen=self.evaluated["predict"])


def evaluate(folder: Path, trainer: Any, module: Evaluated) -> dict[str, Any]:
    """What each stage returned, and which samples each rank saw in it."""
    data = loader(samples=30)
    outcome: dict[str, Any] = {}
    for stage, arguments in (("validate", {}), ("test", {}), ("predict", {"return_predictions": False})):
        result = getattr(trainer, stage)(module, data, **arguments)
        seen = [torch.load(folder / f"rank{rank}.pt")["seen"] for rank in range(RANKS)]
        outcome[stage] = (result, seen)
    return outcome


@pytest.mark.compatibility("Tools", "fit, then validate, test and predict")
def test_validate_test_and_predict_return_what_ddp_returns_alone_and_after_fit(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        # Lightning's all_gather calls it.
        warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated")
        module = Evaluated()
        alone = evaluate(folder, fork_trainer(folder, RANKS), module)
        under_ddp = evaluate(folder, fork_trainer(folder, RANKS, "ddp_fork"), module)
        trainer = fork_trainer(folder, RANKS, max_epochs=8)
        trainer.fit(module, loader(samples=96), loader(samples=24))
        after_fit = evaluate(folder, trainer, module)
        trained_under_ddp = evaluate(folder, fork_trainer(folder, RANKS, "ddp_fork"), module)
        torch.save((alone, under_ddp, after_fit, trained_under_ddp), folder / "outcomes.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    alone, under_ddp, after_fit, trained_under_ddp = torch.load(tmp_path / "outcomes.pt")
    assert alone == under_ddp
    assert after_fit == trained_under_ddp
    assert after_fit["test"][0][0]["loss"] < alone["test"][0][0]["loss"]
    assert [len(seen) for seen in after_fit["predict"][1]] == [15, 15]
