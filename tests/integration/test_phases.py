"""Between segments all ranks are one: same parameters, buffers, metrics and decisions, and nobody waits for ever."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
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
        snapshot = trainer.strategy.engine.snapshot()  # type: ignore[attr-defined]
        if snapshot is not None:
            self.held.append(snapshot.parameters)

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


@pytest.mark.compatibility(
    "Buffers",
    "BatchNorm's and InstanceNorm's running statistics",
    "differs",
    "Averaged over the ranks at each stop (validation, an epoch's end, the end of fit); "
    "DDP takes rank 0's before each forward.",
)
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
        assert state["of_this_rank"].tolist() == [1.0] * 3
        assert state["in_halves"].tolist() == [1.0] * 2
        assert state["number"].item() == 10
        assert state["flag"].tolist() == [True] * 2
        assert torch.equal(state["constant"], torch.tensor(CONSTANTS))
    for other in others:
        assert [hook for hook, _ in other["states"]] == hooks
        for (hook, state), (_, expected) in zip(other["states"], first["states"], strict=True):
            unlike = [name for name in expected if not torch.equal(state[name], expected[name])]
            assert (hook, unlike) == (hook, [])


class Measuring(TinyClassifier):
    """Logs in all the ways there are, and notes what the epoch's metrics should be."""

    def __init__(self) -> None:
        super().__init__(sleep_s=UNEVEN)
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.local = MeanMetric()
        self.correct: list[int] = []
        self.computed: list[float] = []
        self.expected: list[float] = []
        self.epochs: list[dict[str, Any]] = []

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
        # Over all ranks this would wait for ever: they are at other batches.
        self.computed.append(self.local.compute().item())
        self.expected.append(sum(self.seen[-1]) / len(self.seen[-1]))
        mean, last, rank = index.float().mean(), float(index.max()), float(self.global_rank)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("index", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(index))
        self.log("index_too", mean, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(index))
        self.log("last", last, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.log("count", 1.0, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("rank", rank, on_step=True, on_epoch=True, batch_size=len(index))
        return loss

    def on_train_epoch_end(self) -> None:
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        self.epochs.append({"metrics": metrics, "correct": sum(self.correct)})

    def on_train_end(self) -> None:
        values = {"epochs": self.epochs, "computed": self.computed, "expected": self.expected}
        report(Path.cwd(), self.global_rank, **values)


def test_epoch_metrics_cover_all_ranks_and_metrics_in_a_step_are_local(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        # One metric is synchronised on every step, which the strategy warns of.
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *args, **kwargs: print(message)
        fork_trainer(folder, 3, max_epochs=2).fit(Measuring(), loader(samples=64, shuffle=True))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert run.output.count("async_amsgrad does not reduce over the ranks while they train") == 1
    ranks = run.reports()
    for epoch in range(2):
        accuracy = sum(rank["epochs"][epoch]["correct"] for rank in ranks) / 64
        for number, rank in enumerate(ranks):
            metrics = rank["epochs"][epoch]["metrics"]
            assert metrics["accuracy_epoch"] == pytest.approx(accuracy)
            assert metrics["index"] == metrics["index_too_epoch"] == pytest.approx(31.5)
            assert (metrics["last"], metrics["count"]) == (63, 16)
            assert metrics["rank_epoch"] == metrics["rank_step"] == number
    for rank in ranks:
        assert rank["computed"] == pytest.approx(rank["expected"])


class OfACallback(Callback):
    """Measures with a metric that no module has."""

    def __init__(self) -> None:
        self.mean = MeanMetric()
        self.computed: list[float] = []
        self.own: list[list[int]] = []
        self.of_epochs: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mean.reset()
        self.own.append([])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mean.update(batch[2].float())
        self.own[-1] += batch[2].tolist()
        # Over all ranks this would put them in lock step, and wait for ever where one has a batch more.
        self.computed.append(self.mean.compute().item() - sum(self.own[-1]) / len(self.own[-1]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.of_epochs.append(self.mean.compute().item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report(Path.cwd(), trainer.global_rank, errors=self.computed, of_epochs=self.of_epochs)


def test_a_callbacks_metric_is_local_in_a_step_and_of_all_ranks_between_segments(tmp_path: Path) -> None:
    sync = Metric.sync

    def script(folder: Path) -> None:
        module = TinyClassifier(UNEVEN)
        fork_trainer(folder, 3, max_epochs=2, callbacks=[OfACallback()]).fit(module, loader(100))
        assert Metric.sync is sync

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    for rank in run.reports():
        assert rank["errors"] == pytest.approx([0.0] * len(rank["errors"]), abs=1e-4)
        assert rank["of_epochs"] == pytest.approx([49.5] * 2)


class Uneasy(TinyClassifier):
    """Logs what only some ranks log, in an order that differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.rare = MeanMetric()
        self.in_turns = MeanMetric()
        self.metrics: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        names = ["a", "b", "c"] if self.global_rank % 2 else ["c", "a"]
        for name in names:
            self.log(name, 1.0 + self.global_rank, on_step=False, on_epoch=True, sync_dist=True, batch_size=4)
        loss = super().training_step(batch, batch_idx)
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if batch[2].min() == 0:
            self.rare.update(7.0)
            self.log("rare", self.rare, on_step=False, on_epoch=True)
            self.log("once", 5.0, on_step=False, on_epoch=True, sync_dist=True, batch_size=4)
            self.log("largest", 9.0, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
            self.log("smallest", 9.0, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="min")
        if self.global_rank == self.current_epoch:
            self.in_turns.update(10.0 + self.current_epoch)
            self.log("in_turns", self.in_turns, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        self.metrics.append({name: value for name, value in metrics.items() if "train/" not in name})

    def on_train_end(self) -> None:
        report(Path.cwd(), self.global_rank, metrics=self.metrics, seen=self.seen)


@pytest.mark.parametrize(("ranks", "samples"), [(4, 8), (3, 60)], ids=["idle-ranks", "conditional"])
def test_metrics_that_only_some_ranks_log_have_their_value_on_all(tmp_path: Path, ranks: int, samples: int) -> None:
    def script(folder: Path) -> None:
        fork_trainer(folder, ranks, max_epochs=3).fit(Uneasy(), loader(samples))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    everyone = run.reports()
    for epoch in range(3):
        counts = [len(rank["seen"][epoch]) for rank in everyone]
        assert sum(counts) == samples
        first, *others = [rank["metrics"][epoch] for rank in everyone]
        for other in others:
            assert {name: other[name] for name in first} == first
        assert [first[name] for name in ("rare", "largest", "smallest")] == [7, 9, 9]
        assert first["once"] == pytest.approx(5)
        mean = sum((1 + rank) * count for rank, count in enumerate(counts)) / samples
        assert first["a"] == first["c"] == pytest.approx(mean)
        if counts[epoch]:
            assert first["in_turns"] == 10 + epoch


class Ending(TinyClassifier):
    """Notes in which epochs it trained and validated, and with which parameters it ended."""

    def __init__(self) -> None:
        super().__init__(sleep_s=UNEVEN)
        self.validated: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        # Rank 1 alone finds that nothing improves any more.
        self.log("score", float(self.current_epoch if self.global_rank != 1 else 0))

    def on_validation_end(self) -> None:
        self.validated.append(self.trainer.global_step)

    def on_train_end(self) -> None:
        report(
            Path.cwd(),
            self.global_rank,
            epochs=self.trainer.current_epoch,
            step=self.trainer.global_step,
            batches=self.batches,
            validated=self.validated,
            parameters=self.flat_parameters(),
        )


def assert_ended_together(run: Launched) -> None:
    assert run.returncode == 0, run.output
    first, *others = run.reports()
    for other in others:
        assert {name: other[name] for name in ("epochs", "step", "validated")} == {
            name: first[name] for name in ("epochs", "step", "validated")
        }
        assert torch.equal(other["parameters"], first["parameters"])


@pytest.mark.compatibility(
    "Loop",
    "trainer.should_stop set by user code on one rank",
    note="Takes effect when the batches that are out have been applied: about one for each rank.",
)
def test_one_rank_that_asks_to_stop_in_mid_epoch_stops_all(tmp_path: Path) -> None:
    class Stopping(Ending):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_rank == 1 and self.batches == 5:
                self.trainer.should_stop = True

    def script(folder: Path) -> None:
        fork_trainer(folder, 3, max_epochs=4).fit(Stopping(), loader(1200), loader(24))

    run = launch(script, tmp_path)

    assert_ended_together(run)
    assert 5 <= sum(rank["batches"] for rank in run.reports()) < 100
    assert len(run.report(0)["validated"]) == 1


@pytest.mark.compatibility("Loop", "trainer.should_stop set by user code on one rank")
@pytest.mark.parametrize(
    "hook", ["on_train_epoch_start", "on_validation_start", "on_validation_end", "on_train_epoch_end"]
)
def test_one_rank_that_asks_to_stop_between_segments_stops_all(tmp_path: Path, hook: str) -> None:
    class OneRankStops(Callback):
        """Asks from a callback: they come before the module, which counts the validations."""

    def ask(self: Callback, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 1:
            trainer.should_stop = True

    setattr(OneRankStops, hook, ask)

    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, 3, max_epochs=4, val_check_interval=0.5, callbacks=[OneRankStops()])
        trainer.fit(Ending(), loader(96), loader(24))

    run = launch(script, tmp_path)

    assert_ended_together(run)
    batches = {"on_train_epoch_start": 24, "on_train_epoch_end": 48}.get(hook, 36)
    assert sum(rank["batches"] for rank in run.reports()) == batches


@pytest.mark.compatibility("Loop", "min_epochs")
def test_a_stop_before_the_least_number_of_epochs_waits_for_it(tmp_path: Path) -> None:
    class Hasty(Ending):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_rank == 1:
                self.trainer.should_stop = True

    def script(folder: Path) -> None:
        fork_trainer(folder, 3, max_epochs=4, min_epochs=2).fit(Hasty(), loader(48))

    run = launch(script, tmp_path)

    assert_ended_together(run)
    assert sum(rank["batches"] for rank in run.reports()) == 24
    assert run.report(0)["epochs"] == 2


@pytest.mark.compatibility("Loop", "EarlyStopping")
def test_early_stopping_on_one_ranks_metric_stops_all_ranks_at_the_same_epoch(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        callbacks = [EarlyStopping("score", mode="max", patience=2)]
        fork_trainer(folder, 3, max_epochs=9, callbacks=callbacks).fit(Ending(), loader(48), loader(24))

    run = launch(script, tmp_path)

    assert_ended_together(run)
    assert run.report(0)["epochs"] == 3
    assert sum(rank["batches"] for rank in run.reports()) == 36


@pytest.mark.parametrize("batches", ["shared", "sharded"])
def test_ranks_without_a_batch_watch_the_loss_of_the_others(tmp_path: Path, batches: Any) -> None:
    class Watching(Ending):
        logs = True

        def on_train_epoch_end(self) -> None:
            assert all(value.isfinite() for value in self.trainer.callback_metrics.values())

    def script(folder: Path) -> None:
        # Two batches for four ranks, and a loss that nobody reduces.
        strategy = AsyncAMSGradStrategy(batches=batches, start_method="fork")
        callbacks = [EarlyStopping("train/loss_epoch", patience=9)]
        fork_trainer(folder, 4, strategy, max_epochs=4, callbacks=callbacks).fit(Watching(), loader(8))

    run = launch(script, tmp_path)

    assert_ended_together(run)
    assert run.report(0)["epochs"] == 4
    assert sum(rank["batches"] for rank in run.reports()) == 8


def test_one_rank_that_skips_the_rest_of_its_epoch_skips_it_for_all(tmp_path: Path) -> None:
    class Skipping(Ending):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.global_rank == 2 and self.current_epoch == 0 and batch_idx == 2 else None

    def script(folder: Path) -> None:
        fork_trainer(folder, 3, max_epochs=2).fit(Skipping(), loader(240), loader(24))

    run = launch(script, tmp_path)

    assert_ended_together(run)
    ranks = run.reports()
    assert ranks[0]["epochs"] == 2
    assert ranks[2]["batches"] > 2
    assert 60 < sum(rank["batches"] for rank in ranks) < 120
