"""What a run leaves for its user: timeline, record, table."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_async import AsyncAMSGradStrategy, AsyncMonitor
from lightning_async.monitoring.record import RunRecord
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader

RANKS, UPDATES = 3, 60
SLEEP_S = (0.002, 0.002, 0.05)


def monitored(folder: Path) -> None:
    strategy = AsyncAMSGradStrategy(start_method="fork", max_staleness=5, batches="sharded")
    monitor = AsyncMonitor(trace="run.json", folder=folder / "seen")
    trainer = fork_trainer(folder, RANKS, strategy, callbacks=[monitor], max_epochs=2, limit_val_batches=1)
    data = loader(samples=4 * UPDATES // 2)
    trainer.fit(TinyClassifier(sleep_s=SLEEP_S), data, data)
    report(folder, 0, stats=trainer.strategy.stats.as_dict())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    launched = launch(monitored, tmp_path_factory.mktemp("seen"))
    assert launched.returncode == 0, launched.output
    return launched


def tracks(run: Launched) -> dict[tuple[int, int], list[tuple[float, float, str]]]:
    found = defaultdict(list)
    for event in json.loads((run.folder / "seen" / "run.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    return {track: sorted(spans, key=lambda span: (span[0], -span[1])) for track, spans in found.items()}


def test_spans_of_a_track_nest_or_follow_one_another(run: Launched) -> None:
    assert {rank for rank, track in tracks(run) if track == 0} == set(range(RANKS))
    for spans in tracks(run).values():
        open_spans: list[tuple[float, float, str]] = []
        for start, stop, name in spans:
            while open_spans and open_spans[-1][1] <= start + 1e-3:
                open_spans.pop()
            if open_spans:
                outer = open_spans[-1]
                assert stop <= outer[1] + 1e-3, f"{name} {start}-{stop} reaches out of {outer}"
                assert outer[2] in ("data", "sync") and name in ("draw", "wait", "pull")
            open_spans.append((start, stop, name))


def test_a_rank_computes_and_waits_as_long_as_it_trains(run: Launched) -> None:
    batches = run.report(0)["stats"]["batches_by_rank"]
    for (rank, track), spans in tracks(run).items():
        if track != 0:
            continue
        totals: dict[str, float] = defaultdict(float)
        for start, stop, name in spans:
            totals[name] += (stop - start) / 1e6
        assert sum(name == "compute" for _, _, name in spans) == batches[rank]
        assert sum(name == "push" for _, _, name in spans) == batches[rank]
        assert totals["compute"] >= batches[rank] * SLEEP_S[rank]
        covered = sum(totals[name] for name in ("data", "compute", "sync")) + _exchange(spans)
        assert covered <= (max(stop for _, stop, _ in spans) - spans[0][0]) / 1e6
        # What is left is Lightning's own work between the two.
        assert covered >= 0.6 * run.report(0)["stats"]["train_seconds"]


def _exchange(spans: list[tuple[float, float, str]]) -> float:
    """Seconds of push, wait and pull that lie in no other span."""
    seconds, end = 0.0, 0.0
    for start, stop, name in spans:
        if name in ("push", "wait", "pull") and start >= end:
            seconds += (stop - start) / 1e6
        end = max(end, stop)
    return seconds


def test_every_update_has_its_staleness_and_every_parked_gradient_its_span(run: Launched) -> None:
    events = json.loads((run.folder / "seen" / "run.json").read_text())["traceEvents"]
    stats = run.report(0)["stats"]
    counted: dict[int, list[int]] = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counted[event["pid"]].append(event["args"]["updates"])
    by_rank = {rank: {age: ages.count(age) for age in ages} for rank, ages in counted.items()}

    assert by_rank == stats["staleness_by_rank"]
    parked = sum(event["dur"] for event in events if event["name"] == "parked") / 1e6
    assert parked == pytest.approx(sum(stats["parked_seconds_by_rank"].values()), abs=2e-5 * UPDATES)
    assert parked > 0.0


def test_the_record_has_the_whole_run(run: Launched) -> None:
    record, stats = RunRecord.read(run.folder / "seen"), run.report(0)["stats"]

    assert record.finished
    assert {**record.stats, "median_step_seconds_by_rank": None} == {**stats, "median_step_seconds_by_rank": None}
    assert record.configuration["max_staleness"] == 5
    assert median(record.step_seconds[2]) >= 0.9 * SLEEP_S[2]
    assert record.series[-1].updates == UPDATES
    assert [point.updates for point in record.series] == sorted(point.updates for point in record.series)
    assert any(point.loss is not None and 0.0 < point.loss < 2.0 for point in record.series)
    assert [evaluation.epoch for evaluation in record.evaluations] == [1.0, 2.0]
    assert [evaluation.batches for evaluation in record.evaluations] == [UPDATES // 2, UPDATES]
    assert [evaluation.updates for evaluation in record.evaluations] == [UPDATES // 2, UPDATES]
    assert all(evaluation.train_loss is not None for evaluation in record.evaluations)
    assert all("val/loss" in evaluation.metrics for evaluation in record.evaluations)
    assert record.series[-1].staleness_sum == sum(age * count for age, count in stats["staleness"].items())


def test_rank_0_prints_one_table_with_a_diagnosis(run: Launched) -> None:
    output = " ".join(run.output.split())
    assert output.count(f"{UPDATES} updates in ") == 1
    assert "he barrier cost" in output
    for rank in range(RANKS):
        assert f"│ {rank} │" in output


def accumulating(folder: Path) -> None:
    class Constant(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 3.0 + 0.0 * super().training_step(batch, batch_idx)

    trainer = fork_trainer(folder, 2, "async_amsgrad_fork", callbacks=[AsyncMonitor()], accumulate_grad_batches=4)
    trainer.fit(Constant(), loader(64))


def test_the_loss_of_accumulated_batches_is_the_one_that_the_module_returned(tmp_path: Path) -> None:
    run = launch(accumulating, tmp_path)
    assert run.returncode == 0, run.output

    losses = [point.loss for point in RunRecord.read(tmp_path).series if point.loss is not None]

    assert losses == [pytest.approx(3.0)] * len(losses) != []


def without_a_table(folder: Path, **arguments: Any) -> None:
    callbacks = [AsyncMonitor(summary=False)] if arguments.pop("monitor") else []
    strategy = AsyncAMSGradStrategy(start_method="fork", **arguments)
    fork_trainer(folder, 2, strategy, callbacks=callbacks).fit(TinyClassifier(), loader(16))


def test_the_table_can_be_turned_off(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        without_a_table(folder, monitor=True)
        assert (folder / "async_run.json").exists()
        without_a_table(folder, monitor=False, summary=False)

    run = launch(script, tmp_path)
    assert run.returncode == 0, run.output
    assert "updates in" not in run.output


def test_the_monitor_leaves_other_strategies_alone(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[AsyncMonitor(trace="run.json")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(TinyClassifier(), loader(8))
    assert list(tmp_path.iterdir()) == []


def failing(folder: Path, devices: int, strategy: str, after: int) -> None:
    class Failing(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.batches == after and self.global_rank == 0:
                raise RuntimeError("meant to fail")
            return super().training_step(batch, batch_idx)

    trainer = fork_trainer(folder, devices, strategy, callbacks=[AsyncMonitor()], max_epochs=99)
    trainer.fit(Failing(), loader(64))


@pytest.mark.parametrize(
    ("devices", "strategy", "after"),
    [
        (2, "async_amsgrad_fork", 20),  # Lightning tells callbacks nothing in forked ranks; the first epoch is there
        (1, "async_amsgrad", 4),
    ],
)
def test_a_run_that_fails_leaves_a_record(devices: int, strategy: str, after: int, tmp_path: Path) -> None:
    run = launch(partial(failing, devices=devices, strategy=strategy, after=after), tmp_path)
    assert run.returncode != 0
    record = RunRecord.read(tmp_path)
    assert not record.finished
    assert record.stats["updates"] >= min(after, 16)
