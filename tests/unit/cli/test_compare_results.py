"""Claims about the numbers, the tables and the plots of a comparison."""

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.cli.compare.config import Arguments, Comparison, Plot, Sweep, Variant
from lightning_async.cli.compare.plan import PlannedVariant, plan_runs
from lightning_async.cli.compare.plots import draw, mean_curve
from lightning_async.cli.compare.results import Result, Summary, estimate, seconds_to, summarize
from lightning_async.cli.compare.tables import console_table, csv_table, markdown_table
from lightning_async.monitoring.record import RunRecord
from lightning_async.monitoring.series import Evaluation

finite = st.floats(-1e3, 1e3)


def record(accuracies: list[float], epoch_seconds: float = 2.0, **fields: Any) -> RunRecord:
    """A run with a validation after each epoch; ten batches an epoch."""
    evaluations = [
        Evaluation(
            epoch=float(epoch),
            updates=10 * epoch,
            batches=10 * epoch,
            seconds=epoch_seconds * epoch,
            wall_seconds=(epoch_seconds + 1) * epoch,
            train_loss=1.0 / epoch,
            metrics={"val/acc": accuracy, "val/loss": 2.0 / epoch},
        )
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    return RunRecord("DDPStrategy", 2, len(accuracies), True, "2026-01-01T00:00:00+00:00", evaluations, **fields)


def summaries(results: list[Result], target: float | None = 0.9) -> list[Summary]:
    return summarize(results, "val/acc", "max", "val/loss", target)


@given(values=st.lists(st.one_of(st.none(), finite), max_size=6))
def test_an_estimate_is_of_the_values_that_there_are(values: list[float | None]) -> None:
    known = [value for value in values if value is not None]

    result = estimate(values)

    if not known:
        assert result is None
        return
    assert result is not None
    assert result.count == len(known)
    assert result.mean == pytest.approx(statistics.fmean(known))
    assert (result.spread is None) == (len(known) == 1)


def test_a_diverged_run_shows_in_the_estimate() -> None:
    result = estimate([0.5, math.nan])

    assert result is not None and math.isnan(result.mean)


@given(values=st.lists(finite, min_size=1, max_size=8), target=finite, mode=st.sampled_from(["max", "min"]))
def test_the_time_to_a_target_is_that_of_the_first_validation_that_reaches_it(
    values: list[float], target: float, mode: Any
) -> None:
    reached = [value >= target if mode == "max" else value <= target for value in values]

    seconds = seconds_to(record(values), "val/acc", target, mode)

    assert seconds == (2.0 * (reached.index(True) + 1) if any(reached) else None)


@given(runs=st.lists(st.lists(st.tuples(finite, finite), max_size=5), min_size=1, max_size=3))
def test_a_mean_curve_lies_within_its_band(runs: list[list[tuple[float, float]]]) -> None:
    curve = mean_curve(runs)

    assert len(curve) == min(map(len, runs))
    assert all(low - 1e-9 <= mean <= high + 1e-9 for _, mean, low, high in curve)


@pytest.fixture
def compared() -> Comparison:
    return Comparison(
        "r.yaml",
        "out",
        title="T",
        variants=[Variant("fast"), Variant("slow"), Variant("broken")],
        seeds=[1, 2],
        target=0.9,
        baseline="slow",
    )


@pytest.fixture
def results(compared: Comparison) -> list[Result]:
    variants = {run.variant.name: run.variant for run in plan_runs(compared)}
    stats = {"staleness": {0: 1, 3: 2}}
    return [
        Result(variants["fast"], 1, record([0.5, 0.95], 1.0, stats=stats)),
        Result(variants["slow"], 1, record([0.5, 0.95], 4.0)),
        Result(variants["broken"], 1, failure="exit status 1: no | such"),
        Result(variants["fast"], 2, record([0.5, 0.85], 1.0, stats=stats)),
        Result(variants["slow"], 2, record([0.95, 0.95], 4.0)),
        Result(variants["broken"], 2, failure="killed by SIGKILL"),
    ]


def test_the_table_holds_means_spreads_ratios_and_failures(compared: Comparison, results: list[Result]) -> None:
    lines = markdown_table(compared, summaries(results)).splitlines()

    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:5]]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    fast, slow, broken = table["fast"], table["slow"], table["broken"]
    assert fast["runs"] == "2 of 2" and broken["runs"] == "0 of 2"
    assert fast["val/acc, last"] == "0.9000 ± 0.0707"
    assert fast["s/epoch"] == "1.00" and slow["s/epoch"] == "4.00"
    assert fast["speed-up"] == "4.00x" and slow["speed-up"] == "1.00x"
    # One of two runs reached it, after two epochs of 1 s; the baseline after 8 s and 4 s.
    assert fast["s to val/acc 0.9"] == "2.0 (1 of 2 runs)"
    assert slow["s to val/acc 0.9"] == "6.0 ± 2.8"
    assert fast["speed-up to 0.9"] == "3.00x"
    assert fast["staleness, mean"] == "2.00" and slow["staleness, mean"] == "–"
    assert fast["batches/s"] == "10.0"
    assert set(broken.values()) == {"broken", "0 of 2", "–"}
    assert "- broken, seed 1: exit status 1: no | such" in lines


def test_the_csv_table_has_every_number(compared: Comparison, results: list[Result]) -> None:
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(csv_table(compared, summaries(results))))}

    assert float(rows["fast"]["metric"]) == pytest.approx(0.9)
    assert float(rows["fast"]["metric_sd"]) == pytest.approx(0.0707, abs=1e-4)
    assert rows["fast"]["target_seconds_runs"] == "1"
    assert rows["broken"]["metric"] == "" and rows["broken"]["runs_failed"] == "2"


def test_columns_that_were_not_asked_for_are_not_there(compared: Comparison, results: list[Result]) -> None:
    compared.baseline = compared.target = None

    table = markdown_table(compared, summaries(results, target=None))

    assert "speed-up" not in table and "s to" not in table


def test_the_console_table_shows_every_variant(compared: Comparison, results: list[Result]) -> None:
    text = console_table(compared, summaries(results))

    assert all(name in text for name in ("fast", "slow", "broken", "4.00x", "2 of 2"))


def test_plots_are_drawn_for_each_part_and_leave_out_what_has_no_result(tmp_path: Path) -> None:
    grid: dict[str, Any] = {
        "optimizer": [Variant("SGD"), Variant("Adam / W", Arguments({"a": 1}))],
        "delay": Sweep("d", [0, 5, 400]),
    }
    plots = [Plot("curves", "delay", "optimizer"), Plot("final", "delay"), Plot("speedup", "delay", name="quick")]
    compared = Comparison("r.yaml", "out", grid=grid, plots=plots, seeds=[1, 2])
    results = [Result(run.variant, run.seed, record([0.1, 0.2], 1.0 + run.seed)) for run in plan_runs(compared)]
    results[0] = results[1] = Result(results[0].variant, 1, failure="no")

    files = draw(compared, summaries(results), tmp_path)

    assert [path.name for path in files] == [
        "curves-by-delay-sgd.png",
        "curves-by-delay-adam---w.png",
        "final-by-delay.png",
        "quick.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_a_variant_without_any_evaluation_counts_as_failed() -> None:
    variant = PlannedVariant("a", {"variant": "a"}, {})
    empty = record([])

    summary = summaries([Result(variant, 1, empty)])[0]

    assert summary.failures == {1: "nothing was recorded"}
