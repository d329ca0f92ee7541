"""What is recorded of a run with any strategy, and one small comparison from the configuration to the plots."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_async.cli.app import main
from lightning_async.cli.compare.recorder import RunRecorder
from lightning_async.monitoring.record import RunRecord
from tests.launch import launch
from tests.models import TinyClassifier, fork_trainer, loader

ROOT = Path(__file__).parents[2]


VALIDATION_S = 0.03


class CountingLoss(TinyClassifier):
    """The loss of a batch is its samples' mean index: what is recorded can be worked out."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(VALIDATION_S)
        super().validation_step(batch, batch_idx)

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * 0.0 + batch[2].float().mean() if self.training else super().loss(batch)


@pytest.mark.parametrize(
    ("strategy", "ranks", "updates"),
    [("auto", 1, 16), ("ddp_fork", 2, 8), ("async_amsgrad_fork", 2, 16)],
    ids=["one process", "ddp", "async"],
)
def test_a_record_covers_all_ranks_with_any_strategy(tmp_path: Path, strategy: str, ranks: int, updates: int) -> None:
    def script(folder: Path) -> None:
        seed_everything(0, verbose=False)
        callbacks = [RunRecorder(str(folder / "deep" / "record.json"))]
        trainer = fork_trainer(
            folder, ranks, strategy, max_epochs=2, callbacks=callbacks, val_check_interval=0.5, num_sanity_val_steps=1
        )
        trainer.fit(CountingLoss(), loader(samples=64), loader(samples=8))

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    record = RunRecord.read(tmp_path / "deep" / "record.json")
    assert record.finished
    assert (record.ranks, record.max_epochs) == (ranks, 2)
    assert [point.epoch for point in record.evaluations] == [0.5, 1.0, 1.5, 2.0]
    assert [point.batches for point in record.evaluations] == [8, 16, 24, 32]
    assert [point.updates for point in record.evaluations] == [updates * half // 2 for half in (1, 2, 3, 4)]
    # An epoch has every sample once: the mean of all indices from 0 to 63.
    losses = [point.train_loss or 0.0 for point in record.evaluations]
    assert [sum(losses[:2]) / 2, sum(losses[2:]) / 2] == pytest.approx([31.5, 31.5])
    assert all("val/loss" in point.metrics for point in record.evaluations)
    seconds = [point.seconds for point in record.evaluations]
    assert seconds == sorted(seconds) and seconds[0] > 0
    # Four validations of at least one batch were left out.
    assert record.evaluations[-1].wall_seconds - record.evaluations[-1].seconds >= 4 * VALIDATION_S
    assert (record.mean_staleness() is not None) == strategy.startswith("async")


def test_a_run_that_fails_leaves_an_unfinished_record(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        class Failing(TinyClassifier):
            def on_train_epoch_start(self) -> None:
                super().on_train_epoch_start()
                if self.current_epoch == 1:
                    raise ValueError("no luck")

        trainer = fork_trainer(
            folder, 1, "auto", max_epochs=3, callbacks=[RunRecorder("record.json")], accumulate_grad_batches=2
        )
        trainer.fit(Failing(), loader(), loader())

    run = launch(script, tmp_path)

    record = RunRecord.read(tmp_path / "record.json")
    assert run.returncode == 1
    assert not record.finished
    assert [point.epoch for point in record.evaluations] == [1.0]
    # The loss as the training step returned it, not divided by the number of accumulated batches.
    assert record.evaluations[0].train_loss == pytest.approx(0.69, abs=0.2)


OTHERS = (
    "- {name: one process, arguments: {trainer.strategy: auto, trainer.devices: 1}}\n"
    "- {name: wrong, arguments: {trainer.strategy: nosuch}}\n"
)


@pytest.mark.parametrize("others", ["", pytest.param(OTHERS, marks=pytest.mark.soak)], ids=["alone", "beside others"])
def test_a_comparison_trains_reports_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-async"])
    config = tmp_path / "compare.yaml"
    config.write_text(
        f"recipe: recipes/lenet5_digits.yaml\nout: {tmp_path / 'out'}\ntitle: Small\nparallel: 3\n"
        f"baseline: {'one process' if others else 'async'}\n"
        "common: {trainer.max_epochs: 2, trainer.limit_train_batches: 2, trainer.limit_val_batches: 1}\n"
        "variants:\n"
        "- {name: async, arguments: {trainer.strategy: async_amsgrad_fork, trainer.devices: 2}}\n"
        f"{others}"
    )

    statuses = []
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_info:
            main(["compare", "--config", str(config)])
        statuses.append(exit_info.value.code)

    printed = capsys.readouterr().out
    document = (tmp_path / "out" / "results.md").read_text()
    assert statuses == ([1, 1] if others else [0, 0])
    assert len(re.findall(r"✓ async, seed 0: \d+ s", printed)) == 1
    assert printed.count("✓ async, seed 0: was finished") == 1
    wrong = "✗ wrong, seed 0: exit status 2: error: trainer.strategy: there is no strategy 'nosuch'"
    assert printed.count(wrong) == (2 if others else 0)
    assert "| async | 1 of 1 |" in document and ("| wrong | 0 of 1 |" in document) == bool(others)
    assert "lightning-async fit --config recipes/lenet5_digits.yaml --trainer.max_epochs=2" in document
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "runs" / "async" / "seed-0" / "record.json").read_text())
    assert record["strategy"] == "AsyncAMSGradStrategy"
    assert record["evaluations"][-1]["updates"] == 8
