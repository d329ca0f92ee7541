"""Callbacks that show and measure, loggers, profilers, compiled modules, notebooks: what stands around the training."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
    RichModelSummary,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from lightning_async import AsyncAMSGradStrategy
from tests.every_rank import run_on_every_rank
from tests.integration.test_arguments import read_csv
from tests.launch import launch, report
from tests.models import LoggingClassifier, TinyClassifier, fork_trainer, loader

RANKS = 2
UNEVEN = (0.001, 0.004)


def compatible(row: str, **values: Any) -> pytest.MarkDecorator:
    return pytest.mark.compatibility("Tools", row, **values)


COMPILED = (
    "Compile the network (`self.net.compile()`). A compiled LightningModule may not call self.log under torch 2.12 and "
    "2.13, whatever the strategy (Lightning #21836)."
)


class Reporting(TinyClassifier):
    """Reports its parameters and its loss at the end of fit."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.losses: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def values(self) -> dict[str, Any]:
        losses = [float(loss) for loss in self.losses[-3:]]
        return {"parameters": self.flat_parameters(), "loss": sum(losses) / max(1, len(losses))}

    def on_train_end(self) -> None:
        report(Path.cwd(), self.global_rank, **self.values())


@compatible("TensorBoardLogger")
def test_tensorboard_has_the_losses_and_the_asynchronous_metrics_by_the_clocks_steps(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        logger = TensorBoardLogger(folder / "logs", name="", version="")
        trainer = fork_trainer(folder, RANKS, logger=logger, log_every_n_steps=4)
        trainer.fit(LoggingClassifier(UNEVEN), loader(192), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    version = events.Scalars("async/version")
    assert [point.step for point in version] == sorted({point.step for point in version})
    assert (version[-1].step, version[-1].value) == (23, 48)
    assert [point.step for point in events.Scalars("val/loss")] == [23]
    losses = [point.step for point in events.Scalars("train/loss_step")]
    assert losses
    assert all((step + 1) % 4 == 0 for step in losses)


@compatible("RichModelSummary")
def test_the_rich_summary_counts_the_parameters_once(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        trainer = fork_trainer(folder, RANKS, callbacks=[RichModelSummary()], enable_model_summary=True)
        trainer.fit(TinyClassifier(UNEVEN), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert run.output.count("Trainable params") == 1
    # 6 x 8 + 8 and 8 x 2 + 2
    assert "Trainable params: 74" in run.output


@compatible("DeviceStatsMonitor")
def test_device_statistics_are_logged_at_the_clocks_steps(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        logger = CSVLogger(folder / "logs", name="", version="")
        arguments = {"callbacks": [DeviceStatsMonitor(cpu_stats=True)], "logger": logger, "log_every_n_steps": 4}
        fork_trainer(folder, RANKS, **arguments).fit(TinyClassifier(UNEVEN), loader(192))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    name = "DeviceStatsMonitor.on_train_batch_end/cpu_percent"
    steps = [int(row["step"]) for row in read_csv(tmp_path / "logs" / "metrics.csv") if row.get(name)]
    assert steps
    assert all((step + 1) % 4 == 0 for step in steps)


@pytest.mark.parametrize(
    ("profiler", "action"),
    [
        pytest.param(SimpleProfiler, "run_training_batch", marks=compatible("profilers (simple, advanced, pytorch)")),
        pytest.param(AdvancedProfiler, "run_training_batch", marks=compatible("profilers (simple, advanced, pytorch)")),
        pytest.param(PyTorchProfiler, "aten::addmm", marks=compatible("profilers (simple, advanced, pytorch)")),
    ],
)
def test_a_profiler_writes_what_each_rank_did(tmp_path: Path, profiler: Any, action: str) -> None:
    def script(folder: Path) -> None:
        # Equal shares: the PyTorch profiler records from a rank's third batch on.
        strategy = AsyncAMSGradStrategy(start_method="fork", batches="sharded")
        # The PyTorch profiler's table is of the most expensive operations, which are not the same in each run.
        options = {"row_limit": -1} if profiler is PyTorchProfiler else {}
        trainer = fork_trainer(folder, RANKS, strategy, profiler=profiler(folder / "profiles", "profile", **options))
        trainer.fit(TinyClassifier(UNEVEN), loader(96))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    profiles = sorted(path.name for path in (tmp_path / "profiles").glob("*.txt"))
    assert profiles == [f"fit-profile-{rank}.txt" for rank in range(RANKS)]
    for name in profiles:
        assert action in (tmp_path / "profiles" / name).read_text()


@compatible("torch.compile", note=COMPILED)
def test_a_compiled_network_is_compiled_once_and_trains(tmp_path: Path) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    class Network(nn.Module):
        """Around the sequence, since torch does not compile a bare `nn.Sequential`."""

        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    class Compiled(Reporting):
        def values(self) -> dict[str, Any]:
            return super().values() | {"graphs": len(graphs), "version": self.trainer.strategy.version}

    def script(folder: Path) -> None:
        module = Compiled(UNEVEN)
        module.net = Network(module.net)
        module.net.compile(backend=backend)
        fork_trainer(folder, RANKS, max_epochs=8).fit(module, loader(96), loader(24))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    for rank in run.reports():
        # For training and for validation: parameters that the holder has changed are no reason for another.
        assert rank["graphs"] == 2
        assert rank["version"] == 8 * 24
        assert torch.equal(rank["parameters"], run.report(0)["parameters"])
        assert rank["loss"] < 0.6


@compatible("torch.compile", note=COMPILED)
def test_a_compiled_module_that_does_not_log_trains(tmp_path: Path) -> None:
    class Silent(Reporting):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    def script(folder: Path) -> None:
        module = Silent()
        before = module.flat_parameters()
        compiled: Any = torch.compile(module, backend="eager")
        fork_trainer(folder, RANKS).fit(compiled, loader(96))
        torch.save(before, folder / "before.pt")

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    first, second = (rank["parameters"] for rank in run.reports())
    assert torch.equal(first, second)
    assert (first - torch.load(tmp_path / "before.pt")).abs().max() > 1e-2


@compatible(
    "trainer.fit several times in one process",
    note="A Trainer whose ranks are forked or spawned fits once, as under DDP; create another.",
)
def test_fits_evaluations_and_other_strategies_follow_each_other_in_one_process(tmp_path: Path) -> None:
    data = loader(48)

    def train() -> None:
        module = Reporting(UNEVEN)
        first = fork_trainer(tmp_path, RANKS, "async_amsgrad")
        first.fit(module, data)
        tested = first.test(module, data)
        predicted = first.predict(module, data)
        versions = [first.strategy.version]
        first.fit_loop.max_epochs = 3
        first.fit(module, data)
        versions.append(first.strategy.version)
        under_ddp = fork_trainer(tmp_path, RANKS, "ddp")
        under_ddp.fit(module, data)
        second = fork_trainer(tmp_path, RANKS, "async_amsgrad", max_epochs=5)
        second.fit(module, data)
        versions.append(second.strategy.version)
        assert predicted is not None
        last = {
            "versions": versions,
            "tested": tested,
            "predicted": len(torch.cat(predicted)),
            "ddp": under_ddp.global_step,
        }
        report(tmp_path, module.global_rank, loss=module.loss(next(iter(data))).item(), **last)

    run = launch(lambda folder: run_on_every_rank(RANKS, train), tmp_path)

    assert run.returncode == 0, run.output
    first, second = run.reports()
    assert first == second
    assert first["versions"] == [12, 36, 60]
    assert (first["predicted"], first["ddp"]) == (24, 6)
    assert first["loss"] < first["tested"][0]["test/loss"]


@compatible("WandbLogger (offline)")
def test_wandb_keeps_the_run_for_a_later_upload_and_leaves_no_process_behind(tmp_path: Path) -> None:
    def train() -> None:
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        trainer = fork_trainer(tmp_path, RANKS, "async_amsgrad", logger=logger, log_every_n_steps=4)
        trainer.fit(LoggingClassifier(UNEVEN), loader(48), loader(24))
        if trainer.is_global_zero:
            logger.experiment.finish()

    run = launch(lambda folder: run_on_every_rank(RANKS, train), tmp_path)

    assert run.returncode == 0, run.output
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    contents = path.read_bytes()
    assert all(name in contents for name in (b"async/version", b"train/loss_step", b"val/loss"))


FINDERS = 'Run it first on one device: `Tuner(Trainer(devices=1, strategy="auto"))`.'


class Sized(TinyClassifier):
    """Has a batch size to be found."""

    batch_size = 2

    def train_dataloader(self) -> Any:
        return loader(256, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(24)


def find_and_train(folder: Path, method: str, name: str) -> None:
    """Finds on one device, then trains on several."""
    # Lightning's advice about loaders.
    warnings.simplefilter("ignore")
    module = Sized()
    getattr(Tuner(fork_trainer(folder, 1, "auto")), method)(module)
    report(folder, 0, found=getattr(module, name))
    fork_trainer(folder, RANKS).fit(module)


@compatible("learning-rate finder", status="refused", note=FINDERS)
@pytest.mark.parametrize("use", ["callback", "tuner"])
def test_the_learning_rate_finder_is_refused_with_the_way_to_run_it_first(tmp_path: Path, use: str) -> None:
    trainer = fork_trainer(tmp_path, 1, "async_amsgrad", callbacks=[LearningRateFinder()] if use == "callback" else [])

    with pytest.raises(MisconfigurationException, match=r"Run it first on one device, .*lr_find\(model\)"):
        trainer.fit(Sized()) if use == "callback" else Tuner(trainer).lr_find(Sized())
    run = launch(lambda folder: find_and_train(folder, "lr_find", "lr"), tmp_path)

    assert run.returncode == 0, run.output
    assert run.report(0)["found"] != 1e-2


@compatible(
    "batch-size finder",
    status="refused",
    note=f"{FINDERS} Lightning itself refuses it under DDP (Lightning #20994).",
)
def test_the_batch_size_finder_is_refused_with_the_way_to_run_it_first(tmp_path: Path) -> None:
    trainer = fork_trainer(tmp_path, 1, "async_amsgrad", callbacks=[BatchSizeFinder()])

    with pytest.raises(MisconfigurationException, match=r"Run it first on one device, .*scale_batch_size\(model\)"):
        trainer.fit(Sized())
    run = launch(lambda folder: find_and_train(folder, "scale_batch_size", "batch_size"), tmp_path)

    assert run.returncode == 0, run.output
    assert run.report(0)["found"] > 2


@compatible(
    "pytorch_lightning's Trainer",
    status="refused",
    note="Its classes are not those of `lightning`: import `lightning.pytorch` instead.",
)
@pytest.mark.parametrize("first", ["lightning_async", "pytorch_lightning"])
def test_the_twin_packages_trainer_says_what_to_import(tmp_path: Path, first: str) -> None:
    def script(folder: Path) -> None:
        warnings.simplefilter("ignore")
        for name in [name for name in sys.modules if name.split(".")[0] in ("lightning_async", "pytorch_lightning")]:
            del sys.modules[name]
        StrategyRegistry.clear()
        packages = [
            importlib.import_module(name)
            for name in sorted(["lightning_async", "pytorch_lightning"], key=lambda name: name != first)
        ]
        twin = next(package for package in packages if package.__name__ == "pytorch_lightning")
        for name in ("async_amsgrad", "async_amsgrad_fork"):
            with pytest.raises(MisconfigurationException, match=f'"{name}" works with .*import `lightning.pytorch`'):
                twin.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False)
        # Its own strategies are as they were.
        assert type(twin.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork").strategy).__name__ == "DDPStrategy"

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output


class OwnBar(ProgressBar):
    """Shows the loss and the size of the batch, as Lightning's documentation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[int] = []

    def disable(self) -> None:
        """Shows all the same."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert float(outputs["loss"]) * len(batch[0]) > 0
        self.positions.append(batch_idx)


class OwnCheckpoint(ModelCheckpoint):
    """Looks at the loss before it saves."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert float(outputs["loss"]) * len(batch[0]) > 0
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


@compatible(
    "subclasses of ProgressBar and ModelCheckpoint",
    note="They are called once more where the ranks meet, with this rank's last batch, if others have done more since.",
)
@pytest.mark.parametrize("slow", [0, 1])
def test_user_codes_bars_and_checkpoints_are_given_a_batch(tmp_path: Path, slow: int) -> None:
    def on_rank_0(folder: Path) -> None:
        class Reports(OwnBar):
            def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
                if trainer.is_global_zero:
                    report(folder, 0, positions=self.positions)

        bar, checkpoint = Reports(), OwnCheckpoint(folder / "saved", every_n_train_steps=3, save_top_k=-1)
        arguments: dict[str, Any] = {"enable_progress_bar": True, "enable_checkpointing": True, "max_epochs": 2}
        trainer = fork_trainer(folder, RANKS, callbacks=[bar, checkpoint], **arguments)
        # The others' last batch ends after rank 0's own, or before it.
        trainer.fit(TinyClassifier((0.001, 0.04) if slow else (0.04, 0.001)), loader())

    run = launch(on_rank_0, tmp_path)

    assert run.returncode == 0, run.output
    positions = run.report(0)["positions"]
    assert positions[-1] == max(positions) == 7
    # One for the multiples of 3 that the clock has passed during a batch of rank 0, and they may be two.
    steps = sorted(int(path.stem.rpartition("=")[2]) for path in (tmp_path / "saved").glob("*.ckpt"))
    assert 2 <= len(steps) <= 16 // 3
    assert steps[0] <= 8
    assert steps[-1] >= 15


class History(Logger):
    """Relies on the epoch, which Lightning puts into every row, and takes it out."""

    name, version = "history", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, set[str]]] = []

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        """Keeps none."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        epoch = metrics.pop("epoch")
        self.rows.append((int(epoch), set(metrics)))


@compatible("loggers of one's own that rely on `epoch` in every row")
def test_every_row_that_a_logger_gets_has_its_epoch(tmp_path: Path) -> None:
    class Module(TinyClassifier):
        def on_fit_end(self) -> None:
            loggers: Any = self.trainer.loggers
            report(tmp_path, self.global_rank, rows=loggers[0].rows)

    def script(folder: Path) -> None:
        fork_trainer(folder, RANKS, logger=[History()], log_every_n_steps=2, max_epochs=2).fit(Module(UNEVEN), loader())

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    rows = run.report(0)["rows"]
    assert {epoch for epoch, names in rows if "async/version" in names} == {0, 1}


@compatible(
    "`trainer.model.module`, `trainer.model.no_sync()`",
    note="`trainer.model` is a wrapper during fit, as under DDP; it is no `DistributedDataParallel`.",
)
@pytest.mark.parametrize("ranks", [1, RANKS])
def test_the_module_is_reached_through_a_wrapper_as_under_ddp(tmp_path: Path, ranks: int) -> None:
    class Module(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            trainer: Any = self.trainer
            with trainer.model.no_sync():
                loss = super().training_step(batch, batch_idx)
            assert trainer.model.module is trainer.strategy.model.module is self
            assert trainer.lightning_module is self
            return loss

        def on_validation_epoch_end(self) -> None:
            trainer: Any = self.trainer
            assert not trainer.model.training
            assert {f"module.{name}" for name in self.state_dict()} == {*trainer.model.state_dict()}

    def script(folder: Path) -> None:
        module, trainer = Module(), fork_trainer(folder, ranks, "async_amsgrad" if ranks == 1 else "async_amsgrad_fork")
        trainer.fit(module, loader(), loader(8))
        assert ranks > 1 or trainer.model is module

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
