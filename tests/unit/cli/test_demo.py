"""Claims about `lightning-async demo`: its data, its tables, what it leaves and how it ends."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async.cli.compare.progress import RunsDisplay
from lightning_async.cli.compare.runner import Job, Outcome
from lightning_async.cli.demo import command, demo_main
from lightning_async.cli.demo.digits import DigitsDataModule, available_source
from lightning_async.cli.demo.glyphs import draw_digits
from lightning_async.cli.demo.results import Run, comparison_table, rank_table
from lightning_async.monitoring.record import RunRecord
from lightning_async.monitoring.series import Evaluation


def record(accuracies: list[float], **fields: Any) -> RunRecord:
    """A run whose epochs have forty batches and take two seconds, validation included."""
    evaluations = [
        Evaluation(float(epoch), 40 * epoch, 40 * epoch, 1.5 * epoch, 2.0 * epoch, None, {"val/acc": accuracy})
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    return RunRecord("DDPStrategy", 4, len(accuracies), True, "2026-01-01T00:00:00+00:00", evaluations, **fields)


def cells(table: str) -> list[list[str]]:
    """The cells of a table, without its headings."""
    return [re.split(r"\s*│\s*", line)[1:-1] for line in table.splitlines() if line.startswith("│")][1:]


def test_a_run_is_read_from_its_record(tmp_path: Path) -> None:
    record([0.5, 0.95, 0.9]).write(tmp_path / "record.json")
    (tmp_path / "test.json").write_text('{"test/acc": 0.9}')

    run = Run.read("ddp", tmp_path, threshold=0.95)

    assert run == Run("ddp", 120, 6.0, 0.95, seconds_to_threshold=4.0, test_accuracy=0.9)
    assert run.batches_per_second == 20
    assert Run.read("ddp", tmp_path, threshold=0.96).seconds_to_threshold is None


def test_the_rank_table_shows_share_staleness_and_waiting_of_each_rank() -> None:
    stats = {
        "batches_by_rank": {0: 30, 1: 10},
        "staleness_by_rank": {0: {0: 20, 1: 10}, 1: {3: 10}},
        "wait_seconds_by_rank": {0: 0.5, 1: 1.25},
    }

    assert cells(rank_table(stats)) == [
        ["0", "30", "75.0%", "0.33", "1", "0.50"],
        ["1", "10", "25.0%", "3.00", "3", "1.25"],
    ]


def test_the_comparison_gives_ratios_above_one_where_the_run_is_faster() -> None:
    run = Run("async", batches=100, seconds=2.0, threshold=0.95, seconds_to_threshold=1.0, test_accuracy=0.98)
    baseline = Run("ddp", batches=100, seconds=4.0, threshold=0.95, seconds_to_threshold=3.0, test_accuracy=0.97)

    rows = cells(comparison_table(run, baseline))

    assert [row[-1] for row in rows] == ["2.00x", "3.00x", "2.00x", ""]


def test_the_comparison_says_so_where_a_run_did_not_reach_the_accuracy() -> None:
    run = Run("async", batches=10, seconds=2.0, threshold=0.95, seconds_to_threshold=1.0, test_accuracy=0.98)
    baseline = Run("ddp", batches=10, seconds=4.0, threshold=0.95, seconds_to_threshold=None, test_accuracy=0.9)

    row = cells(comparison_table(run, baseline))[1]

    assert row[1:] == ["1.0 s", "not reached", "-"]


def test_drawn_digits_are_images_between_zero_and_one_and_a_function_of_their_seed() -> None:
    labels = torch.arange(20) % 10

    images = draw_digits(labels, seed=0)

    assert images.shape == (20, 1, 28, 28)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, draw_digits(labels, seed=0))
    assert not torch.equal(images, draw_digits(labels, seed=1))


def test_drawn_digits_can_be_told_apart_but_not_at_a_glance() -> None:
    data = DigitsDataModule(source="drawn")
    data.setup("fit")
    images, labels = data.train_set.tensors
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)]).flatten(1)
    shown, truth = data.val_set.tensors

    nearest = torch.cdist(shown.flatten(1), means).argmin(1)

    # Chance is 0.1; LeNet-5 comes to 0.97.
    assert 0.3 < (nearest == truth).float().mean() < 0.9


def test_drawn_digits_are_as_many_as_handwritten_ones_and_all_equally_frequent() -> None:
    data = DigitsDataModule(source="drawn")
    data.setup("fit")

    sizes = [len(part) for part in (data.train_set, data.val_set, data.test_set)]
    counts = torch.bincount(data.val_set.tensors[1], minlength=10)

    assert sizes == [1261, 268, 268]
    assert counts.max() - counts.min() <= 1


def test_handwritten_digits_without_scikit_learn_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)

    assert available_source() == "drawn"
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        DigitsDataModule()


def pretend(monkeypatch: pytest.MonkeyPatch, **ends: tuple[int, bool]) -> list[list[str]]:
    """Has no process started: each strategy's run has an exit status, and has left a record of an asynchronous run."""
    commands: list[list[str]] = []

    def run_jobs(jobs: list[Job], display: RunsDisplay, parallel: int, timeout_s: float) -> list[Outcome]:
        (job,) = jobs
        commands.append(list(job.command))
        status, leaves_record = ends[job.name]
        job.folder.mkdir(parents=True)
        (job.folder / "output.log").write_text(f"said by {job.name}\n")
        if leaves_record:
            (job.folder / "async_run.json").write_text("{}")
        if status < 0:
            raise KeyboardInterrupt
        if status == 0:
            record([0.9, 0.99]).write(job.record)
            (job.folder / "test.json").write_text(json.dumps({"test/acc": 0.98}))
        return [Outcome(job, f"exit status {status}" if status else None, 3.0, status)]

    monkeypatch.setattr(command, "run_jobs", run_jobs)
    monkeypatch.setattr(command, "report_line", lambda folder: f"report: {folder}/report.html")
    return commands


def test_the_demo_ends_with_the_comparison_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = pretend(monkeypatch, async_amsgrad=(0, True), ddp=(0, False))

    status = demo_main(["--out", str(tmp_path / "out"), "--trainer.max_epochs=2"])

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert "scikit-learn's handwritten digits" in lines[0]
    assert any("test accuracy" in line and "98.00%" in line for line in lines)
    assert lines[-1] == f"report: {tmp_path / 'out' / 'async_amsgrad'}/report.html"
    assert all(words[-1] == "--trainer.max_epochs=2" for words in commands)
    assert [word for word in commands[0] if "lightning_async.AsyncMonitor" in word]


def test_the_demo_says_that_its_digits_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    commands = pretend(monkeypatch, async_amsgrad=(0, True), ddp=(0, False))

    demo_main(["--out", str(tmp_path / "out")])

    assert "digits drawn for this demo (scikit-learn" in capsys.readouterr().out.splitlines()[0]
    assert all("--data.init_args.source=drawn" in words for words in commands)


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ({"async_amsgrad": (3, True)}, 3, "said by async_amsgrad"),
        ({"async_amsgrad": (0, True), "ddp": (7, False)}, 7, "said by ddp"),
        ({"async_amsgrad": (-2, True)}, 130, "interrupted"),
    ],
    ids=["first run fails", "second run fails", "Ctrl+C"],
)
def test_a_demo_that_ends_early_has_the_status_of_its_run_and_names_the_report(
    ends: dict[str, tuple[int, bool]],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, **ends)

    assert demo_main(["--out", str(tmp_path / "out")]) == status

    lines = capsys.readouterr().out.splitlines()
    assert said in lines
    assert lines[-1] == f"report: {tmp_path / 'out' / 'async_amsgrad'}/report.html"


def test_the_demo_does_not_empty_a_folder_that_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "async_amsgrad").mkdir()
    (tmp_path / "async_amsgrad" / "thesis.tex").touch()

    with pytest.raises(SystemExit) as exit_info:
        demo_main(["--out", str(tmp_path)])

    assert exit_info.value.code == 2
    assert "something else's" in capsys.readouterr().err
    assert (tmp_path / "async_amsgrad" / "thesis.tex").exists()
