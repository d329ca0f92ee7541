"""Buffers: each rank has its own while it trains; at each stop they are made the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async import AMSGrad
from tests.compatibility.runs import Reporting, train
from tests.launch import launch
from tests.models import TinyClassifier, fork_trainer, loader


class Normalized(Reporting):
    """BatchNorm, and buffers of all kinds; notes them before and at each stop."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("weighed", torch.zeros(2), persistent=False)
        self.register_buffer("chosen", torch.zeros(2))
        self.register_buffer("counted", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.register_buffer("samples", torch.zeros(()))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("order", torch.arange(5))
        self.register_buffer("absent", None)
        self.averaged_buffers = ["chosen"]
        self.own: list[dict[str, Tensor]] = []
        self.common: list[dict[str, Tensor]] = []
        self.counts: list[int] = []

    def copies(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.named_buffers()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.weighed += 1 + self.global_rank
        self.chosen += 1 + self.global_rank
        self.counted += 1
        self.samples += len(batch[0])
        self.pointer = (self.pointer + 3 + self.global_rank) % 7
        self.order = torch.randperm(5)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last = self.copies()

    def on_validation_start(self) -> None:
        self.own.append(self.last)
        self.last = self.copies()
        self.common.append(self.last)
        self.counts.append(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def facts(self) -> dict[str, Any]:
        return {"own": self.own, "common": self.common, "counts": self.counts, "saved": list(self.state_dict())}


@pytest.mark.compatibility("Buffers", "non-persistent buffers", note="As the others.")
@pytest.mark.compatibility(
    "Buffers",
    "counters",
    note="What DDP would show at each stop: buffers that every rank has advanced alike for each of its batches.",
)
@pytest.mark.compatibility(
    "Buffers",
    "BatchNorm's and InstanceNorm's running statistics",
    "differs",
    "Averaged over the ranks at each stop (validation, an epoch's end, the end of fit); "
    "DDP takes rank 0's before each forward.",
)
@pytest.mark.compatibility(
    "Buffers",
    "other buffers",
    "differs",
    "Rank 0's at each stop; DDP takes them before each forward. A module may name floating-point buffers in "
    "`averaged_buffers` (a codebook's moving averages, a normalization of its own): those are averaged.",
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_at_each_stop_buffers_are_the_mean_or_ddps_count_or_rank_0s(tmp_path: Path, batches: str) -> None:
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
                *("weighed", "chosen", "counted", "samples", "pointer", "order"),
            }
            count = rank["counts"][stop]
            assert count == 4 * (stop + 1)
            assert common["counted"].tolist() == [count, count]
            assert common["net.1.num_batches_tracked"].item() == count
            assert common["samples"].item() == 4.0 * count
            for name in ("net.1.running_mean", "net.1.running_var", "chosen"):
                mean = torch.stack([buffers[name].double() for buffers in own]).mean(dim=0).float()
                assert torch.equal(common[name], mean)
            for name in ("weighed", "pointer", "order"):
                assert torch.equal(common[name], own[0][name])


class Parametrized(Reporting):
    """A spectral norm, whose buffers are unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        middle = nn.Linear(16, 16)
        nn.init.orthogonal_(middle.weight)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.utils.parametrizations.spectral_norm(middle), nn.ReLU(), nn.Linear(16, 2)
        )
        self.norms: list[float] = []

    def on_validation_start(self) -> None:
        parametrization: Any = self.net[1]
        self.norms.append(float(parametrization.parametrizations.weight[0]._u.norm()))

    def facts(self) -> dict[str, Any]:
        return {"norms": self.norms}


@pytest.mark.compatibility("Buffers", "spectral norm", note="Rank 0's unit vectors at each stop.")
def test_the_vectors_of_a_spectral_norm_stay_unit_vectors(tmp_path: Path) -> None:
    run = train(tmp_path, Parametrized, validation_samples=12, max_epochs=2)

    for rank in run.reports():
        assert rank["norms"] == pytest.approx([1.0, 1.0], abs=1e-4)


class OfItsOwn(Reporting):
    """Buffers and a parameter that DDP is told to ignore, and buffers that are not of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("chain", torch.zeros(3))
        self.register_buffer("memory", torch.zeros(0), persistent=False)
        self.register_buffer("alike", torch.zeros(2))
        self.prompt = nn.Parameter(torch.zeros(2), requires_grad=False)
        self._ddp_params_and_buffers_to_ignore = ["chain", "prompt"]

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.net.parameters(), lr=1e-2)

    def on_train_start(self) -> None:
        # pytest would keep it.
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: print(message)  # type: ignore[assignment]
        self.chain.fill_(self.global_rank + 1)
        self.prompt.data.fill_(self.global_rank + 1)
        if self.global_rank == 1:
            self.register_buffer("a_late_one", torch.ones(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.memory = torch.cat([self.memory, torch.full((1 + self.global_rank,), float(self.global_rank))])
        self.alike.fill_(self.global_rank + 1)
        return super().training_step(batch, batch_idx)

    def facts(self) -> dict[str, Any]:
        prompt = self.prompt.detach().clone()
        # The ranks' parameters are compared at the end.
        self.prompt.data.zero_()
        return {"memory": self.memory, "alike": self.alike, "prompt": prompt, "chain": self.chain}


@pytest.mark.compatibility(
    "Buffers", "`_ddp_params_and_buffers_to_ignore`", note="Each rank's own. An optimizer may have none of them."
)
@pytest.mark.compatibility(
    "Buffers",
    "buffers of another size on each rank",
    "differs",
    "Each rank keeps its own, with one warning that names them; DDP fails unless `broadcast_buffers=False`.",
)
def test_what_ddp_ignores_or_cannot_send_stays_each_ranks_own(tmp_path: Path) -> None:
    run = train(tmp_path, OfItsOwn, {"batches": "sharded"}, validation_samples=12, max_epochs=2)

    for number, rank in enumerate(run.reports()):
        assert rank["chain"].tolist() == [number + 1.0] * 3
        assert rank["prompt"].tolist() == [number + 1.0] * 2
        assert rank["memory"].tolist() == [float(number)] * (16 * (number + 1))
        assert rank["alike"].tolist() == [1.0, 1.0]
    told = [line for line in run.output.splitlines() if "do not have one shape and dtype" in line]
    assert len(told) == 1
    assert "a_late_one (rank 0: none, rank 1: (2,) torch.float32, rank 2: none); memory (rank 0: (8,)" in told[0]


@pytest.mark.compatibility(
    "Refused",
    "an optimizer with parameters of `_ddp_params_and_buffers_to_ignore`",
    "refused",
    "DDP lets each rank train its own. Take them out of the list, or out of the optimizer.",
)
def test_a_parameter_that_ddp_ignores_cannot_be_trained(tmp_path: Path) -> None:
    class Ignoring(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self._ddp_params_and_buffers_to_ignore = ["net.0.weight"]

    def script(folder: Path) -> None:
        fork_trainer(folder, 2).fit(Ignoring(), loader())

    run = launch(script, tmp_path)

    assert run.returncode != 0
    assert "net.0.weight: named in _ddp_params_and_buffers_to_ignore and given to an optimizer" in run.output
