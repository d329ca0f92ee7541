"""Between the segments all ranks are one: same parameters, buffers, metrics and decisions, and nobody waits for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_async import AsyncAMSGradStrategy
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader

UNEVEN = (0.001, 0.002, 0.006)
# Masks and the like: their sum over the ranks is out of float32's range, or rounded.
CONSTANTS = (torch.finfo(torch.float32).min, -torch.inf, 0.1, 16_777_213.0)


class WithBuffers(TinyClassifier):
    """BatchNorm, and buffers that every rank fills with its own number."""

    def __init__(self) -> None:
        super().__init__(sleep_s=UNEVEN)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("of_this_rank", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("in_halves", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("constant", torch.tensor(CONSTANTS), persistent=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.of_this_rank.fill_(self.global_rank + 1)
        self.in_halves.fill_(self.global_rank + 1)
        self.number.fill_(self.global_rank + 10)
        self.flag.fill_(self.global_rank == 0)
        return super().training_step(batch, batch_idx)


class StateKeeper(Callback):
    """Notes parameters and buffers in the hooks where all ranks must agree, and the holder's version of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[tuple[str, dict[str, Tensor]]] = []
        self.held: list[Tensor] = []
        self.running_means: list[Tensor] = []

    def note(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        self.states.append((hook, {name: value.clone() for name, value in module.state_dict().items()}))
        holder = trainer.strategy._engine.holder  # type: ignore[attr-defined]
        if holder is not None:
            self.held.append(holder.snapshot().parameters)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("validation_start", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("validation_end", trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("train_epoch_end", trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any) -> None:
        self.note("save_checkpoint", trainer, pl_module)
        saved = checkpoint["state_dict"]
        assert all(torch.equal(saved[name], value) for name, value in self.states[-1][1].items())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("train_end", trainer, pl_module)
        names = [name for name, _ in pl_module.named_parameters()]
        report(self.folder, trainer.global_rank, states=self.states, held=self.held, names=names)


def test_at_every_stop_all_ranks_hold_the_holders_parameters_and_common_buffers(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        callbacks = [StateKeeper(folder), ModelCheckpoint(folder / "checkpoints", monitor="val/loss")]
        # Equal shares, so that every rank writes into its buffers before every stop.
        strategy = AsyncAMSGradStrategy(batches="sharded", start_method="fork")
        arguments = {"val_check_interval": 0.5, "callbacks": callbacks, "enable_checkpointing": True}
        trainer = fork_trainer(folder, 3, strategy, max_epochs=2, **arguments)
        trainer.fit(WithBuffers(), loader(samples=96), loader(samples=24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first, *others = run.reports()
    hooks = [hook for hook, _ in first["states"]]
    assert [hooks.count(hook) for hook in ("validation_start", "validation_end")] == [4, 4]
    assert [hooks.count(hook) for hook in ("train_epoch_end", "train_end")] == [2, 1]
    assert "save_checkpoint" in hooks
    for (_, state), held in zip(first["states"], first["held"], strict=True):
        assert torch.equal(torch.cat([state[name].reshape(-1) for name in first["names"]]), held)
        assert state["of_this_rank"].tolist() == [2.0] * 3
        assert state["in_halves"].tolist() == [2.0] * 2
        assert state["number"].item() == 10
        assert state["flag"].tolist() == [True] * 2
        assert torch.equal(state["constant"], torch.tensor(CONSTANTS))
    for other in others:
        assert [hook for hook, _ in other["states"]] == hooks
        for (hook, state), (_, expected) in zip(other["states"], first["states"], strict=True):
            unlike = [name for name in expected if not torch.equal(state[name], expected[name])]
            assert (hook, unlike) == (hook, [])


class Measuring(TinyClassifier):
    """Logs in all the ways there are, and notes what it logged."""

    def __init__(self) -> None:
        super().__init__(sleep_s=UNEVEN)
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.local = MeanMetric()
        self.correct: list[int] = []
        self.computed: list[tuple[float, float]] = []
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.correct = []
        self.local.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        x, y, index = batch
        logits = self.net(x)
        self.correct += (logits.argmax(dim=1) == y).int().tolist()
        self.accuracy(logits, y)
        self.local.update(index.float())
        # Not "over all ranks": they are at other batches, and would never come.
        seen = torch.tensor(self.seen[-1], dtype=torch.float32)
        self.computed.append((self.local.compute().item(), seen.mean().item()))
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        size = len(index)
        self.log("mean_index", index.float().mean(), on_epoch=True, sync_dist=True, batch_size=size)
        self.log("rank", float(self.global_rank), on_step=True, on_epoch=True, batch_size=size)
        self.log("sum_of_ones", 1.0, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("highest", float(index.max()), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        return loss

    def on_train_end(self) -> None:
        report(
            Path.cwd(), self.global_rank, seen=self.seen, computed=self.computed, logged=self.trainer.logged
        )


class LoggedMetrics(Callback):
    """Keeps ``trainer.callback_metrics`` of each epoch's end, as a callback behind it would find them."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


def test_epoch_metrics_cover_all_ranks_samples_and_metrics_in_a_step_are_local(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        class Module(Measuring):
            def on_train_epoch_end(self) -> None:
                metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
                self.epochs.append({**metrics, "correct": sum(self.correct)})

            def on_train_end(self) -> None:
                report(
                    folder, self.global_rank, epochs=self.epochs, seen=self.seen, computed=self.computed
                )

        fork_trainer(folder, 3, max_epochs=2).fit(Module(), loader(samples=63, shuffle=True))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ranks = run.reports()
    for epoch in range(2):
        correct = sum(rank["epochs"][epoch]["correct"] for rank in ranks)
        for number, rank in enumerate(ranks):
            metrics = rank["epochs"][epoch]
            assert metrics["accuracy_epoch"] == pytest.approx(correct / 63)
            assert metrics["mean_index_epoch"] == pytest.approx(sum(range(63)) / 63)
            assert metrics["highest"] == 62
            assert metrics["sum_of_ones"] == 16
            assert metrics["rank_epoch"] == metrics["rank_step"] == number
    for rank in ranks:
        assert [ours for ours, _ in rank["computed"]] == pytest.approx([mean for _, mean in rank["computed"]])
