"""One rank's NaN does not reach the parameters; a rank that sends nothing else, and a run that has diverged, end it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async import AsyncStrategy
from lightning_async.runtime.failure import WorkerFailedError
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader
from tests.simulated import Module, cluster, fit, make_module

RANKS = 2


class Spoiled(TinyClassifier):
    """Some of its losses are NaN."""

    def __init__(self, is_spoiled: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.is_spoiled = is_spoiled

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.is_spoiled(self.global_rank, self.batches) else loss


def train(folder: Path, is_spoiled: Callable[[int, int], bool], **options: Any) -> Launched:
    def script(folder: Path) -> None:
        # pytest's own handlers would swallow what a user sees.
        logging.getLogger().handlers.clear()
        module = Spoiled(is_spoiled)
        strategy = AsyncStrategy(start_method="fork", batches="sharded", **options)
        trainer = fork_trainer(folder, RANKS, strategy)
        trainer.fit(module, loader(samples=160))
        stats = trainer.strategy.stats.as_dict()  # type: ignore[attr-defined]
        report(folder, 0, stats=stats, parameters=module.flat_parameters(), step=trainer.global_step)

    return launch(script, folder)


def test_one_nan_of_one_rank_is_told_and_does_not_reach_the_parameters(tmp_path: Path) -> None:
    run = train(tmp_path, lambda rank, batch: (rank, batch) == (1, 5))

    assert run.returncode == 0, run.output
    assert run.report(0)["parameters"].isfinite().all()
    stats = run.report(0)["stats"]
    assert stats["rejected_by_rank"] == {0: 0, 1: 1}
    assert stats["batches_by_rank"] == {0: 20, 1: 20}
    assert stats["updates"] == 39
    assert run.output.count("a gradient of rank 1") == 1
    assert "1 gradient was not finite (NaN or infinity) and not applied: 1 of rank 1" in " ".join(run.output.split())


def test_a_rank_that_sends_nothing_else_is_named_and_ends_the_run(tmp_path: Path) -> None:
    run = train(tmp_path, lambda rank, batch: rank == 1 and batch > 2, max_rejected_in_a_row=3)

    assert run.returncode == 1
    assert "rank 1 failed: 3 gradients in a row were not finite" in run.output


class SpoiledInVirtualTime(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (torch.nan if batch_idx in self.spoiled else 1.0)

    spoiled: Any = ()


@pytest.mark.parametrize("rejects", [True, False])
def test_a_simulated_cluster_rejects_alike(tmp_path: Path, rejects: bool) -> None:
    module = make_module(SpoiledInVirtualTime)
    module.spoiled = (4, 9)

    trainer = fit(tmp_path, module, cluster([1, 1, 2], reject_nonfinite=rejects), max_epochs=1)

    finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert finite == rejects
    assert trainer.strategy.stats.rejected == (2 if rejects else 0)  # type: ignore[attr-defined]


def test_a_simulated_cluster_that_has_diverged_says_so(tmp_path: Path) -> None:
    module = make_module(SpoiledInVirtualTime)
    module.spoiled = range(10, 10_000)

    with pytest.raises(WorkerFailedError, match=r"training has diverged: 4 gradients in a row were not finite"):
        fit(tmp_path, module, cluster([1, 1, 1], max_rejected_in_a_row=4))
