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
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async import AsyncAMSGradStrategy, AsyncMonitor
from lightning_async.monitoring.record import RunRecord
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader
from tests.trace_rules import check_trace, slices, tracks

RANKS, UPDATES = 3, 60
# In the timeline, after the ranks.
HOLDER = RANKS
SLEEP_S = (0.002, 0.002, 0.05)


def monitored(folder: Path) -> None:
    strategy = AsyncAMSGradStrategy(start_method="fork", max_staleness=5, batches="sharded")
    monitor = AsyncMonitor(trace="run.json", folder=folder / "seen")
    callbacks = [monitor, ModelCheckpoint(folder / "checkpoints")]
    trainer = fork_trainer(
        folder, RANKS, strategy, callbacks=callbacks, max_epochs=2, limit_val_batches=1, enable_checkpointing=True
    )
    data = loader(samples=4 * UPDATES // 2)
    trainer.fit(TinyClassifier(sleep_s=SLEEP_S), data, data)
    report(folder, 0, stats=trainer.strategy.stats.as_dict())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    launched = launch(monitored, tmp_path_factory.mktemp("seen"))
    assert launched.returncode == 0, launched.output
    return launched


def events(run: Launched) -> list[dict[str, Any]]:
    return list(json.loads((run.folder / "seen" / "run.json").read_text())["traceEvents"])


def test_the_timeline_keeps_the_rules_of_its_format(run: Launched) -> None:
    found = events(run)

    check_trace(found)
    assert {rank for rank, track in tracks(found) if track == 0} == {*range(RANKS), HOLDER}


def test_spans_lie_only_in_what_they_are_a_part_of(run: Launched) -> None:
    for (rank, _), on_track in tracks(events(run)).items():
        outer: dict[str, Any] | None = None
        for event in slices(on_track):
            if outer is None or event["ts"] >= outer["ts"] + outer["dur"] - 1e-3:
                outer = event
            else:
                assert rank != HOLDER
                assert outer["name"] in ("data", "sync"), (outer, event)
                assert event["name"] in ("draw", "wait", "pull", "checkpoint"), (outer, event)


def test_each_batch_is_computed_and_pushed_once_for_as_long_as_it_takes(run: Launched) -> None:
    batches = run.report(0)["stats"]["batches_by_rank"]
    for rank in range(RANKS):
        own = slices(tracks(events(run))[rank, 0])
        totals: dict[str, float] = defaultdict(float)
        for event in own:
            totals[event["name"]] += event["dur"] / 1e6
        computed = [event["args"]["batch"] for event in slices(own, "compute")]
        assert len(computed) == batches[rank]
        assert computed == [event["args"]["batch"] for event in slices(own, "push")]
        # From 0 on in each of the two epochs.
        assert computed == 2 * list(range(batches[rank] // 2))
        assert totals["compute"] >= batches[rank] * SLEEP_S[rank]
        # What is left of the time is Lightning's own work between two of them.
        covered = sum(totals[name] for name in ("data", "compute", "sync", "validation")) + _exchange(own)
        assert covered <= (max(event["ts"] + event["dur"] for event in own) - own[0]["ts"]) / 1e6


def _exchange(found: list[Any]) -> float:
    """Seconds of push, wait and pull that lie in no other span."""
    seconds, end = 0.0, 0.0
    for event in found:
        if event["name"] in ("push", "wait", "pull") and event["ts"] >= end:
            seconds += event["dur"] / 1e6
        end = max(end, event["ts"] + event["dur"])
    return seconds


def test_an_arrow_leads_from_each_push_to_its_update(run: Launched) -> None:
    found = events(run)
    updates = [event for event in slices(found) if event["pid"] == HOLDER]

    assert [event["args"]["version"] for event in updates] == list(range(1, UPDATES + 1))
    ends = {event["id"]: event["ts"] for event in found if event["ph"] == "f"}
    by_time = {event["ts"]: event["args"] for event in updates}
    pushes = {(event["pid"], event["ts"]): event["args"] for event in slices(found, "push")}
    starts = [event for event in found if event["ph"] == "s"]
    assert len(starts) == len(pushes) == UPDATES
    for start in starts:
        push, update = pushes[start["pid"], start["ts"]], by_time[ends[start["id"]]]
        assert update["rank"] == start["pid"]
        assert update["version read"] == push["version"]
        assert update["staleness"] == push["staleness"] == update["version"] - 1 - push["version"]


def test_validations_and_checkpoints_have_their_spans(run: Launched) -> None:
    for rank in range(RANKS):
        own = slices(tracks(events(run))[rank, 0])
        assert len(slices(own, "validation")) == 2
        assert (len(slices(own, "checkpoint")) > 0) == (rank == 0)


def test_every_update_has_its_staleness_and_every_parked_gradient_its_span(run: Launched) -> None:
    stats = run.report(0)["stats"]
    counted: dict[int, list[int]] = defaultdict(list)
    for event in events(run):
        if event["ph"] == "C":
            counted[event["pid"]].append(event["args"]["updates"])
    by_rank = {rank: {age: ages.count(age) for age in ages} for rank, ages in counted.items()}

    assert by_rank == stats["staleness_by_rank"]
    parked = sum(event["dur"] for event in slices(events(run), "parked")) / 1e6
    assert parked == pytest.approx(sum(stats["parked_seconds_by_rank"].values()), abs=2e-5 * UPDATES)
    assert parked > 0.0


def test_the_record_has_the_whole_run(run: Launched) -> None:
    record, stats = RunRecord.read(run.folder / "seen"), run.report(0)["stats"]

    assert record.finished
    assert {**record.stats, "median_step_seconds_by_rank": None} == {**stats, "median_step_seconds_by_rank": None}
    assert record.configuration["max_staleness"] == 5
    assert record.configuration["transport"] == "shm"
    assert record.configuration["transport_by_rank"] == ["in process", "shm", "shm"]
    assert record.configuration["requested"] == {"transport": "auto", "holder_device": "auto", "holder_threads": "auto"}
    assert record.about["started_at"] <= record.about["ended_at"] == record.written_at
    assert {"command", "host", "python", "torch", "lightning", "lightning_async"} <= record.about.keys()
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


def test_the_last_line_names_the_record_and_the_command(run: Launched) -> None:
    lines = [line for line in run.output.splitlines() if "seen" in line]
    assert f"lightning-async report {run.folder / 'seen'}" in lines[-1]
    assert str(run.folder / "seen" / "run.json") in lines[-2]


def fit_quietly(folder: Path, monitor: AsyncMonitor | None, **arguments: Any) -> None:
    strategy = AsyncAMSGradStrategy(start_method="fork", **arguments)
    callbacks = [] if monitor is None else [monitor]
    fork_trainer(folder, 2, strategy, callbacks=callbacks).fit(TinyClassifier(), loader(16))


@pytest.mark.parametrize(
    ("monitor", "strategy", "shown"),
    [
        (AsyncMonitor(summary=False), {}, False),
        (AsyncMonitor(), {"summary": False}, False),
        (None, {"summary": False}, False),
        (AsyncMonitor(summary=True), {"summary": False}, True),
        (AsyncMonitor(), {}, True),
    ],
)
def test_the_monitor_leaves_the_table_to_the_strategy_unless_told(
    monitor: AsyncMonitor | None, strategy: dict[str, Any], shown: bool, tmp_path: Path
) -> None:
    run = launch(partial(fit_quietly, monitor=monitor, **strategy), tmp_path)
    assert run.returncode == 0, run.output
    assert ("updates in" in run.output) == shown
    assert (tmp_path / "async_run.json").exists() == (monitor is not None)


def test_without_a_monitor_the_last_line_says_how_to_get_a_report(tmp_path: Path) -> None:
    run = launch(partial(fit_quietly, monitor=None), tmp_path)
    assert run.returncode == 0, run.output
    assert "AsyncMonitor" in run.output.splitlines()[-1]


def test_the_report_is_written_if_it_is_wanted(tmp_path: Path) -> None:
    run = launch(partial(fit_quietly, monitor=AsyncMonitor(report=True)), tmp_path)
    assert run.returncode == 0, run.output
    assert run.output.splitlines()[-1] == f"Report of the run: {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


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


def ending_early(
    folder: Path, devices: int, strategy: str, culprit: int, error: type[BaseException], holder: Any = "thread"
) -> None:
    class Failing(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.batches == 20 and self.global_rank == culprit:
                raise error("meant to end")
            return super().training_step(batch, batch_idx)

    chosen = AsyncAMSGradStrategy(start_method="fork", holder=holder) if devices > 1 else strategy
    monitor = AsyncMonitor(trace="run.json", report=True)
    trainer = fork_trainer(folder, devices, chosen, callbacks=[monitor], max_epochs=99)
    try:
        trainer.fit(Failing(), loader(64))
    finally:
        assert devices > 1 or monitor.record_path == folder / "async_run.json"


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyboardInterrupt, pytest.param(SIGTERMException, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize(
    ("devices", "strategy", "culprit", "holder"),
    [
        (1, "async_amsgrad", 0, "thread"),
        (2, "", 0, "thread"),
        (2, "", 1, "thread"),
        pytest.param(2, "", 1, "process", marks=pytest.mark.soak),
    ],
)
def test_a_run_that_ends_early_leaves_its_record_and_timeline(
    devices: int, strategy: str, culprit: int, holder: str, error: type[BaseException], tmp_path: Path
) -> None:
    script = partial(ending_early, devices=devices, strategy=strategy, culprit=culprit, error=error, holder=holder)
    run = launch(script, tmp_path)

    assert run.returncode != 0
    record = RunRecord.read(tmp_path)
    assert not record.finished
    # On another rank than the culprit the name is that of the failure.
    assert culprit > 0 or record.about["ended_by"].startswith(error.__name__)
    assert record.stats["updates"] >= 16
    # The others push on until they hear of it.
    assert 0 <= record.stats["updates"] - record.series[-1].updates <= devices - 1
    assert record.configuration["transport"] in ("shm", "in process")
    trace = json.loads((tmp_path / "run.json").read_text())
    check_trace(trace["traceEvents"])
    assert trace["otherData"]["ended_by"] == record.about["ended_by"]
    at_the_holder = [event for event in slices(trace["traceEvents"]) if event["pid"] == devices]
    # Another rank may push between the two.
    assert len(at_the_holder) >= record.stats["updates"]
    # A failure's own words are not buried under a table.
    assert ("updates in" in run.output) == (culprit == 0 and error is not RuntimeError)
    if devices == 1:
        assert (tmp_path / "report.html").exists()
        assert f"Report of the run: {tmp_path / 'report.html'}" in run.output
    else:
        assert f"lightning-async report {tmp_path}" in run.output


def test_a_folder_that_cannot_be_written_costs_no_error_its_message(tmp_path: Path) -> None:
    def script(folder: Path) -> None:
        class Failing(TinyClassifier):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.batches == 5:
                    (folder / "seen" / "async_run.json").unlink()
                    (folder / "seen").rmdir()
                    (folder / "seen").write_text("in the way")
                    raise RuntimeError("meant to fail")
                return super().training_step(batch, batch_idx)

        fork_trainer(folder, 1, "async_amsgrad", callbacks=[AsyncMonitor(folder=folder / "seen")]).fit(
            Failing(), loader(64)
        )

    run = launch(script, tmp_path)

    assert run.returncode != 0
    assert "RuntimeError: meant to fail" in run.output
    assert (tmp_path / "seen").read_text() == "in the way"
