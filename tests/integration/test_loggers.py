"""What reaches the loggers, read back from the files that they leave."""

from __future__ import annotations

import csv
import itertools
import json
import struct
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_async import AsyncAMSGradStrategy
from lightning_async.strategies import fit as fit_module
from tests.launch import launch, report
from tests.models import LoggingClassifier, fork_trainer, loader

RANKS, UPDATES = 3, 24


class FinishWandb(Callback):
    """Ends the run in the process that it lives in, and reports what it must say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy: Any = trainer.strategy
        if trainer.is_global_zero:
            report(self.folder, 0, stats=strategy.stats.as_dict(), summary=strategy.stats.summary())
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()


def fit(folder: Path, loggers: list[Any]) -> None:
    strategy = AsyncAMSGradStrategy(start_method="fork", max_staleness=7)
    trainer = fork_trainer(
        folder, RANKS, strategy, logger=loggers, log_every_n_steps=2, callbacks=[FinishWandb(folder)]
    )
    trainer.fit(LoggingClassifier(sleep_s=(0.001, 0.004, 0.001)), loader(samples=4 * UPDATES))


def with_wandb(folder: Path) -> None:
    fit(folder, [WandbLogger(offline=True, save_dir=folder, project="async", prefix="p")])


def with_files(folder: Path) -> None:
    fit(folder, [TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="csv")])


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pending = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a block's end is padded
            position += 32768 - position % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        pending += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.mark.compatibility("Tools", "WandbLogger: metrics, histograms, configuration and summary", status="works")
def test_wandb_shows_the_run_over_its_version(tmp_path: Path) -> None:
    run = launch(with_wandb, tmp_path)
    assert run.returncode == 0, run.output
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(path))
    expected = run.report(0)

    definitions = {r.metric.glob_name or r.metric.name: r.metric for r in records if r.HasField("metric")}
    assert definitions["p-async/*"].step_metric == "p-async/version"

    config = {}
    for record in records:
        config |= values(record.config.update)
        config |= values(record.run.config.update)
    assert config["async"] == {
        "strategy": "AsyncAMSGradStrategy",
        "ranks": RANKS,
        "max_staleness": 7,
        "on_stale": "wait",
        "batches": "shared",
        "gradients_per_update": 1,
        "staleness_policy": "plain",
        "momentum_correction": None,
        "reject_nonfinite": True,
        "max_rejected_in_a_row": 10,
        "step_timeout_s": None,
        "max_slowdown": None,
        "transport": "shm",
        "transport_by_rank": ["in process", "shm", "shm"],
        "batch_source": "shared order",
        "worker_timeout_s": 60.0,
        "overlap": False,
        "wire_dtype": "fp32",
        "parameter_wire_dtype": "fp32",
        "holder_device": "cpu",
        "holder": "thread",
        # Three ranks leave no core of the machines that this runs on.
        "holder_threads": config["async"]["holder_threads"],
        "holder_shards": 1,
        "requested": {"transport": "auto", "holder_device": "auto", "holder_threads": "auto"},
    }

    rows = [row for r in records if r.HasField("history") and "p-async/version" in (row := values(r.history.item))]
    assert rows[-1]["p-async/version"] == UPDATES
    assert [row["p-async/version"] for row in rows] == sorted(row["p-async/version"] for row in rows)
    counted = 0
    for row in rows:
        assert row["p-async/staleness/_type"] == "histogram"
        counted += sum(row["p-async/staleness/values"])
        assert sum(row[f"p-async/share_rank_{rank}"] for rank in range(RANKS)) == pytest.approx(1.0)
        by_rank = sum(row[f"p-async/updates_per_second_rank_{rank}"] for rank in range(RANKS))
        assert by_rank == pytest.approx(row["p-async/updates_per_second"])
    assert counted == UPDATES

    summary: dict[str, Any] = {}
    for record in records:
        summary |= values(record.summary.update)
    # What the runs table shows is the run's, and not the last row's.
    numbers = expected["summary"]
    for name in ("staleness_mean", "staleness_p95", "staleness_max", "share_rank_0", "share_rank_1", "share_rank_2"):
        assert summary[f"p-async/{name}"] == numbers[name]
    assert summary["p-async/version"] == UPDATES
    assert summary["p-async/updates_per_second"] == pytest.approx(summary["async_run/updates_per_second"])
    assert summary["p-async/wait_fraction"] == pytest.approx(summary["async_run/wait_fraction"])
    for name, value in expected["summary"].items():
        # What this fit waited until its end is in the statistics by now.
        if "seconds" not in name and "fraction" not in name and "per_second" not in name:
            assert summary[f"async_run/{name}"] == value
    assert summary["async_run/updates"] == UPDATES
    assert {f"async_run/wait_fraction_rank_{rank}" for rank in range(RANKS)} <= summary.keys()


def test_tensorboard_shows_histograms_and_other_loggers_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = launch(with_files, tmp_path)
    assert run.returncode == 0, run.output
    staleness = run.report(0)["stats"]["staleness"]

    board = EventAccumulator(str(tmp_path / "board" / "version_0"), size_guidance={"histograms": 0})
    board.Reload()
    histograms = [event.histogram_value for event in board.Histograms("async/staleness")]
    assert sum(h.num for h in histograms) == UPDATES
    assert sum(h.sum for h in histograms) == sum(age * count for age, count in staleness.items())
    assert max(h.max for h in histograms) == max(staleness)
    assert [event.value for event in board.Scalars("async/version")][-1] == UPDATES
    assert {"async/configuration/text_summary", "async/summary/text_summary"} <= set(board.Tags()["tensors"])
    assert [event.value for event in board.Scalars("async_run/updates")] == [UPDATES]
    text = board.Tensors("async/configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| max_staleness | 7 |" in text
    assert "| transport | shm |" in text

    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows_of_the_run = [row for row in rows if row["async/version"]]
    assert float(rows_of_the_run[-1]["async/version"]) == UPDATES
    assert "async/updates_per_second_rank_2" in rows[0]
    assert "async/staleness" not in rows[0]


def validating_often(folder: Path, ends_by: type[BaseException] | None = None, ranks: int = RANKS) -> None:
    class Module(LoggingClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if ends_by is not None and self.global_rank == 0 and self.trainer.global_step >= 20:
                raise ends_by("meant to end")
            return super().training_step(batch, batch_idx)

    trainer = fork_trainer(
        folder,
        ranks,
        "async_amsgrad_fork" if ranks > 1 else "async_amsgrad",
        logger=[
            WandbLogger(offline=True, save_dir=folder, project="async"),
            CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
        ],
        log_every_n_steps=8,
        val_check_interval=3,
        limit_val_batches=1,
        max_epochs=2,
    )
    data = loader(samples=4 * ranks * 13)
    trainer.fit(Module(sleep_s=(0.001, 0.004, 0.001)), data, data)


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["async/version"]]


def wandb_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        for record in wandb_records(path):
            summary |= values(record.summary.update)
    return summary


def test_a_validation_makes_no_row_of_a_few_updates(tmp_path: Path) -> None:
    run = launch(validating_often, tmp_path)
    assert run.returncode == 0, run.output
    versions = [float(row["async/version"]) for row in csv_rows(tmp_path)]

    assert versions[-1] == 2 * RANKS * 13
    # Half of log_every_n_steps on every rank, or one update less on each that rank 0 had not read.
    windows = [late - early for early, late in itertools.pairwise([0.0, *versions[:-1]])]
    assert min(windows) >= 3 * RANKS
    assert len(versions) < 2 * 13 / 3  # of that many validations


@pytest.mark.parametrize("ends_by", [pytest.param(RuntimeError, marks=pytest.mark.soak), KeyboardInterrupt])
def test_a_run_that_ends_early_has_a_last_row_of_a_whole_window(ends_by: type[BaseException], tmp_path: Path) -> None:
    run = launch(partial(validating_often, ends_by=ends_by), tmp_path)
    assert run.returncode != 0

    *_, before, last = (float(row["async/version"]) for row in csv_rows(tmp_path))
    assert last >= 20 * RANKS
    assert before < last


@pytest.mark.parametrize("ends_by", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_early_has_the_whole_runs_summary_too(ends_by: type[BaseException], tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        # In one process, where wandb gets to its end by itself.
        try:
            validating_often(folder, ends_by, ranks=1)
        finally:
            sys.modules["wandb"].finish()

    run = launch(script, tmp_path)
    assert run.returncode != 0

    summary = wandb_summary(tmp_path)
    assert summary["async/version"] == summary["async_run/updates"] == float(csv_rows(tmp_path)[-1]["async/version"])
    assert summary["async_run/updates"] >= 20
    assert summary["async/updates_per_second"] == pytest.approx(summary["async_run/updates_per_second"])


def without_a_logger(folder: Path) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("metrics are computed for nobody")

    fit_module.MetricsLogger = refuse  # type: ignore[assignment,misc]
    fork_trainer(folder, 2, logger=False).fit(LoggingClassifier(), loader(16))


def test_without_a_logger_no_metric_is_computed(tmp_path: Path) -> None:
    run = launch(without_a_logger, tmp_path)
    assert run.returncode == 0, run.output


class Broken(TensorBoardLogger):
    """A logger whose service is gone when the strategy describes the run to it."""

    @property
    def experiment(self) -> Any:
        def add_text(*arguments: Any) -> None:
            raise ConnectionError("the tracking server does not answer")

        return SimpleNamespace(add_text=add_text, flush=lambda: None)

    def finalize(self, status: str) -> None:
        """Nothing: there is no writer."""


def test_a_logger_that_cannot_begin_leaves_the_optimizers_as_they_were(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        module = LoggingClassifier()
        trainer = fork_trainer(folder, 1, "async_amsgrad", logger=Broken(folder))
        with pytest.raises(ConnectionError, match="tracking server"):
            trainer.fit(module, loader(16))
        (optimizer,) = trainer.strategy.optimizers
        report(folder, 0, state=type(vars(optimizer)["state"]).__name__, engine=trainer.strategy.engine)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    assert run.report(0) == {"state": "defaultdict", "engine": None}
