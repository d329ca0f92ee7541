"""Optimization: parameters and param groups that callbacks and hooks change in the course of a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from lightning_async import AMSGrad, AsyncAMSGradStrategy
from tests.compatibility.runs import RANKS, History, Reporting, train
from tests.launch import launch
from tests.models import fork_trainer, loader


class TwoParts(Reporting):
    """An encoder that is not trained at first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.encoders: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.encoder(batch[0])), batch[1])

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.encoders.append(self.encoder.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return AMSGrad((parameter for parameter in self.parameters() if parameter.requires_grad), lr=1e-2)

    def facts(self) -> dict[str, Any]:
        return {"encoders": self.encoders}


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.encoder)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoder, optimizer, lr=1e-3)
        elif epoch > 1:
            # A resumed run has the groups of its checkpoint, and is frozen as at the start.
            self.make_trainable(pl_module.encoder)


FINETUNING = "`BaseFinetuning` callbacks: `add_param_group` between epochs, and resuming after it"


@pytest.mark.compatibility("Optimization", FINETUNING)
@pytest.mark.parametrize(
    "options", [{}, {"batches": "sharded", "transport": "tcp"}], ids=["shared-memory", "sharded-tcp"]
)
def test_a_param_group_that_is_added_in_mid_run_is_trained_and_the_others_keep_their_state(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = train(tmp_path, TwoParts, options, max_epochs=3, callbacks=[Unfreezing()])

    first = run.report(0)
    assert first["version"] == 72
    assert [update["lrs"] for update in first["updates"]] == [[1e-2]] * 24 + [[1e-2, 1e-3]] * 48
    assert [len(update["gradients"]) for update in first["updates"]] == [4] * 24 + [6] * 48
    assert [first["holder"][0]["state"][index]["step"].item() for index in range(6)] == [72] * 4 + [48] * 2
    for rank in run.reports():
        start, unfrozen, trained = rank["encoders"]
        assert torch.equal(start, unfrozen)
        assert not torch.equal(unfrozen, trained)
        assert torch.equal(trained, first["encoders"][2])


@pytest.mark.compatibility("Optimization", FINETUNING)
@pytest.mark.parametrize("holder", ["thread", pytest.param("process", marks=pytest.mark.soak)])
def test_a_run_with_added_param_groups_can_be_resumed(tmp_path: Path, holder: Any) -> None:
    def script(folder: Path) -> None:
        def fit(epochs: int, checkpoint: Path | None) -> None:
            strategy = AsyncAMSGradStrategy(holder=holder, start_method="fork")
            strategy.observers.append(History())
            callbacks = [Unfreezing(), ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)]
            arguments: dict[str, Any] = {"max_epochs": epochs, "callbacks": callbacks, "enable_checkpointing": True}
            fork_trainer(folder, RANKS, strategy, **arguments).fit(TwoParts(), loader(96), ckpt_path=checkpoint)

        fit(2, None)
        warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
        fit(3, folder / "checkpoints" / "epoch=1.ckpt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    before, after = (
        torch.load(tmp_path / "checkpoints" / f"epoch={epoch}.ckpt", weights_only=False)["optimizer_states"][0]
        for epoch in (1, 2)
    )
    assert [before["state"][index]["step"].item() for index in range(6)] == [48] * 4 + [24] * 2
    assert [after["state"][index]["step"].item() for index in range(6)] == [72] * 4 + [48] * 2
    assert [group["lr"] for group in after["param_groups"]] == [1e-2, 1e-3]
    assert [group["amsgrad"] for group in after["param_groups"]] == [True, True]
    assert [update["lrs"] for update in run.report(0)["updates"]] == [[1e-2, 1e-3]] * 24


def test_amsgrad_is_on_for_groups_that_are_added_to_an_adam_without_it() -> None:
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())

    with pytest.warns(UserWarning, match="turns AMSGrad on"):
        AsyncAMSGradStrategy()._accept_optimizer(optimizer)
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})

    assert [group["amsgrad"] for group in optimizer.param_groups] == [True, True]


@pytest.mark.compatibility("Optimization", "`add_param_group` by hand, around validation in mid-epoch")
def test_a_param_group_can_be_added_after_a_validation_in_mid_epoch(tmp_path: Path) -> None:
    class AddsOne(TwoParts):
        def configure_optimizers(self) -> Any:
            return AMSGrad(self.net.parameters(), lr=1e-2)

        def on_validation_end(self) -> None:
            if self.trainer.global_step == 4:
                self.optimizers().add_param_group({"params": list(self.encoder.parameters())})

    run = train(tmp_path, AddsOne, validation_samples=12, val_check_interval=0.5)

    updates = run.report(0)["updates"]
    assert sorted(ticket for update in updates for ticket in update["tickets"]) == list(range(24))
    assert [len(update["gradients"]) for update in updates] == [4] * 12 + [6] * 12


@pytest.mark.compatibility("Optimization", "freezing and unfreezing in mid-training (`requires_grad_`)")
def test_parameters_that_are_frozen_for_an_epoch_stay_as_they_are(tmp_path: Path) -> None:
    class FrozenInEpochOne(TwoParts):
        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            self.encoder.requires_grad_(self.current_epoch != 1)

    run = train(tmp_path, FrozenInEpochOne, max_epochs=3)

    updates = run.report(0)["updates"]
    frozen = [[gradient is None for gradient in update["gradients"]] for update in updates]
    assert [all(none[4:]) for none in frozen] == [False] * 24 + [True] * 24 + [False] * 24
    start, trained, frozen_until = run.report(1)["encoders"]
    assert not torch.equal(start, trained)
    assert torch.equal(trained, frozen_until)
    assert not torch.equal(frozen_until, run.report(1)["parameters"]["encoder.weight"])


class Momentum(Reporting):
    """A target network that follows the trained one, as BYOL's does, and a frozen layer; no optimizer has them."""

    def __init__(self) -> None:
        super().__init__(lr=5e-2)
        self.target = nn.Linear(6, 8).requires_grad_(False)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.begin = self.copies()
        self.own: list[dict[str, Tensor]] = []
        self.common: list[dict[str, Tensor]] = []

    def copies(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.named_parameters() if "net" not in name}

    def configure_optimizers(self) -> Any:
        return AMSGrad(self.net.parameters(), lr=self.lr)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for target, online in zip(self.target.parameters(), self.net[0].parameters(), strict=True):
            # A tensor of its own each time, as the papers' code has it.
            target.data = target.data * 0.9 + online.data * 0.1
        self.last = self.copies()

    def on_validation_start(self) -> None:
        self.own.append(self.last)
        self.common.append(self.copies())

    def facts(self) -> dict[str, Any]:
        return {"begin": self.begin, "own": self.own, "common": self.common}


@pytest.mark.compatibility(
    "Optimization",
    "momentum encoders, and other parameters that no optimizer has",
    "differs",
    "Each rank moves its own; at each stop those that have come to differ are averaged, as buffers are. Leave them out "
    "of the optimizer: what an optimizer has is the holder's, and the next answer overwrites it.",
)
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_at_each_stop_a_momentum_encoder_is_the_mean_of_the_ranks(tmp_path: Path, batches: str) -> None:
    run = train(tmp_path, Momentum, {"batches": batches}, validation_samples=12, val_check_interval=0.5)

    ranks, begin = run.reports(), run.report(0)["begin"]
    for stop in range(2):
        own = [rank["own"][stop]["target.weight"] for rank in ranks]
        assert not torch.equal(own[0], own[1])
        mean = torch.stack([weight.double() for weight in own]).mean(dim=0).float()
        for rank in ranks:
            common = rank["common"][stop]
            assert torch.equal(common["target.weight"], mean)
            assert torch.equal(common["frozen.weight"], begin["frozen.weight"])
            assert not torch.equal(common["target.weight"], begin["target.weight"])


class Halving(Reporting):
    """Trains nothing, and halves its parameters by hand."""

    def __init__(self, hook: str) -> None:
        super().__init__(lr=0.0)
        self.begin = {name: value.detach().clone() for name, value in self.named_parameters()}
        inherited = getattr(self, hook)

        def halve(*arguments: Any) -> None:
            inherited(*arguments)
            for parameter in self.parameters():
                parameter.data.mul_(0.5)

        setattr(self, hook, halve)

    def facts(self) -> dict[str, Any]:
        return {"begin": self.begin}


@pytest.mark.parametrize(
    ("hook", "times"),
    [
        *(
            pytest.param(
                hook,
                times,
                marks=pytest.mark.compatibility(
                    "Optimization", "parameters changed by hand in the hooks of a fit, an epoch or a validation"
                ),
            )
            for hook, times in [("on_train_start", 1), ("on_train_epoch_start", 2), ("on_validation_end", 4)]
        ),
        pytest.param(
            "on_train_batch_start",
            0,
            marks=pytest.mark.compatibility(
                "Optimization",
                "parameters changed by hand in a batch's hooks",
                "differs",
                "The holder has the parameters: the next answer overwrites the change. Change them in "
                "`on_train_epoch_start` or around validation, or change the gradient.",
            ),
        ),
    ],
)
def test_the_holder_takes_over_what_is_changed_by_hand_between_segments(tmp_path: Path, hook: str, times: int) -> None:
    run = train(tmp_path, lambda: Halving(hook), validation_samples=12, val_check_interval=0.5, max_epochs=2)

    first = run.report(0)
    assert first["version"] == 48
    for name, value in first["begin"].items():
        assert torch.equal(first["parameters"][name], value * 0.5**times)


class Averaging(Reporting):
    """Notes what it validates with, and its parameters at each epoch's start."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        if norm:
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.validated: list[Tensor] = []
        self.starts: list[Tensor] = []

    def on_validation_epoch_start(self) -> None:
        self.validated.append(self.flat_parameters())

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.starts.append(self.flat_parameters())

    def facts(self) -> dict[str, Any]:
        callbacks: Any = self.trainer
        (callback,) = (one for one in callbacks.callbacks if hasattr(one, "_average_model"))
        norms = [layer for layer in self.modules() if isinstance(layer, nn.BatchNorm1d)]
        return {
            "flat": self.flat_parameters(),
            "validated": self.validated,
            "starts": self.starts,
            "averaged": getattr(callback._average_model, "n_averaged", torch.zeros(())).item(),
            "tracked": [layer.num_batches_tracked.item() for layer in norms],
        }


@pytest.mark.compatibility(
    "Optimization",
    "`WeightAveraging` and `EMAWeightAveraging`",
    "differs",
    "One average, rank 0's, updated once for each step of the clock with the parameters that rank 0 has then; "
    "all ranks get it at each stop. A callback with an `on_train_batch_end` of its own averages on each rank "
    "by itself.",
)
@pytest.mark.parametrize(
    ("make_callback", "averaged"),
    [
        (WeightAveraging, 16),
        (lambda: EMAWeightAveraging(decay=0.5), 16),
        (lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=5), 4),
    ],
    ids=["mean", "ema", "every-5-steps"],
)
def test_all_ranks_validate_and_end_with_one_average_of_each_step(
    tmp_path: Path, make_callback: Any, averaged: int
) -> None:
    run = train(
        tmp_path, Averaging, validation_samples=12, val_check_interval=0.5, max_epochs=2, callbacks=[make_callback()]
    )

    first, *others = run.reports()
    assert first["step"] == 16
    assert first["averaged"] == averaged
    for other in others:
        assert other["averaged"] == averaged
        assert [torch.equal(a, b) for a, b in zip(first["validated"], other["validated"], strict=True)] == [True] * 4
    # The average is not what was trained on, which is there again after validation.
    assert not torch.equal(first["flat"], first["validated"][0])
    assert not torch.equal(first["validated"][1], first["starts"][1])


@pytest.mark.compatibility("Optimization", "`StochasticWeightAveraging`")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch-norm"])
@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_stochastic_weight_averaging_ends_with_the_mean_of_the_epochs(tmp_path: Path, norm: bool, batches: str) -> None:
    callback = StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=2)

    run = train(tmp_path, lambda: Averaging(norm), {"batches": batches}, max_epochs=4, callbacks=[callback])

    first = run.report(0)
    mean = torch.stack(first["starts"][1:4]).mean(dim=0)
    torch.testing.assert_close(first["flat"], mean)
    assert first["version"] == 96
    # With BatchNorm there is a pass more, without updates, for the statistics of the averaged parameters.
    assert sum(rank["batches"] for rank in run.reports()) == (120 if norm else 96)
    if norm:
        assert first["tracked"] == [8]
