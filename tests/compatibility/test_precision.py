"""Precision: what is computed in which dtype, and what the holder keeps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from tests.compatibility.runs import Reporting, train


class Precise(Reporting):
    """Notes the dtypes that it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].to(next(self.parameters()).dtype)
        logits = self.net(x)
        self.dtypes.add(logits.dtype)
        return torch.nn.functional.cross_entropy(logits, batch[1])

    def facts(self) -> dict[str, Any]:
        strategy: Any = self.trainer.strategy
        snapshot = strategy.engine.snapshot()
        return {"dtypes": self.dtypes, "masters": None if snapshot is None else snapshot.parameters}


def arguments_for(precision: str) -> dict[str, Any]:
    # On a CPU Lightning takes bfloat16 where this one is asked for by its name.
    if precision == "16-mixed":
        return {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    return {"precision": precision}


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([parameter.reshape(-1) for parameter in parameters.values()])


NOTE_16 = (
    "Each rank has its own gradient scaler. On a CPU Lightning takes bfloat16 for this name; "
    'the test passes `MixedPrecision("16-mixed", "cpu")`.'
)


@pytest.mark.parametrize(
    ("precision", "computed", "kept"),
    [
        pytest.param(
            *case, id=case[0], marks=pytest.mark.compatibility("Precision", f'`precision="{case[0]}"`', note=note)
        )
        for case, note in [
            (("32-true", torch.float32, torch.float32), ""),
            (("bf16-mixed", torch.bfloat16, torch.float32), ""),
            (("16-mixed", torch.float16, torch.float32), NOTE_16),
            (("64-true", torch.float64, torch.float64), ""),
            (
                ("bf16-true", torch.bfloat16, torch.bfloat16),
                "The holder keeps float32 master weights, which checkpoints round to bfloat16.",
            ),
            (
                ("16-true", torch.float16, torch.float16),
                "The holder keeps float32 master weights, which checkpoints round to float16.",
            ),
        ]
    ],
)
def test_ranks_compute_in_the_precision_and_the_holder_keeps_at_least_float32(
    tmp_path: Path, precision: Any, computed: torch.dtype, kept: torch.dtype
) -> None:
    run = train(tmp_path, Precise, gradient_clip_val=0.1, **arguments_for(precision))

    first = run.report(0)
    assert first["version"] == 24
    masters = first["masters"]
    assert masters.dtype == torch.promote_types(kept, torch.float32)
    for rank in run.reports():
        assert rank["dtypes"] == {computed}
        assert {parameter.dtype for parameter in rank["parameters"].values()} == {kept}
        assert torch.equal(flat(rank["parameters"]), masters.to(kept))
    for update in first["updates"]:
        gradient = torch.cat([part.reshape(-1) for part in update["gradients"]])
        assert gradient.isfinite().all()
        assert 0 < gradient.norm() <= 0.1 * 1.01
    if kept.itemsize == 2:
        # Nothing would be gained if they were rounded too.
        assert not torch.equal(masters.to(kept).to(masters.dtype), masters)


class NoLossAtTheEnd(Precise):
    """Gives no loss after the first step, nor for the batches that are left over from whole blocks."""

    def on_fit_start(self) -> None:
        warnings.filterwarnings("ignore", "`training_step` returned `None`")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if self.trainer.global_step else loss


@pytest.mark.parametrize("make_module", [Precise, NoLossAtTheEnd])
def test_accumulated_batches_that_are_left_over_are_unscaled_if_there_is_a_gradient(
    tmp_path: Path, make_module: Any
) -> None:
    run = train(tmp_path, make_module, accumulate_grad_batches=5, **arguments_for("16-mixed"))

    updates = run.report(0)["updates"]
    if make_module is Precise:
        assert sorted(len(update["tickets"]) for update in updates) == [4, 5, 5, 5, 5]
    assert sum(rank["batches"] for rank in run.reports()) == 24
    for update in updates:
        assert 0 < torch.cat([part.reshape(-1) for part in update["gradients"]]).norm() < 10


class Overflowing(Precise):
    """Has an infinite loss in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.infinite = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 4 == 2:
            self.infinite += 1
            loss = loss * torch.inf
        return loss

    def facts(self) -> dict[str, Any]:
        plugin: Any = self.trainer.precision_plugin
        return {**super().facts(), "infinite": self.infinite, "scale": plugin.scaler.get_scale()}


@pytest.mark.compatibility("Precision", "16-mixed: a step whose gradient is infinite is skipped, and its batch is done")
@pytest.mark.parametrize("batches", ["shared", "sharded"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_whose_gradient_is_infinite_is_done_and_makes_no_update(
    tmp_path: Path, batches: str, accumulated: int
) -> None:
    run = train(
        tmp_path, Overflowing, {"batches": batches}, accumulate_grad_batches=accumulated, **arguments_for("16-mixed")
    )

    ranks, updates = run.reports(), run.report(0)["updates"]
    assert sum(rank["batches"] for rank in ranks) == 24
    assert [len(update["tickets"]) for update in updates] == [accumulated] * len(updates)
    assert len(updates) == ranks[0]["version"] == 24 // accumulated - sum(rank["infinite"] for rank in ranks)
    assert sum(rank["infinite"] for rank in ranks) > 0
    for number, rank in enumerate(ranks):
        # The scaler halves its scale at each infinity.
        assert rank["scale"] == 2.0 ** (16 - rank["infinite"])
        pushed = sum(update["worker"] == number for update in updates)
        assert pushed == rank["batches"] // accumulated - rank["infinite"]
    assert all(part.isfinite().all() for update in updates for part in update["gradients"])
