"""`lightning-async plan` as its user sees it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_async.cli.plan import plan_main
from lightning_async.monitoring.record import RunRecord
from lightning_async.monitoring.stats import RunStats


def test_a_slow_worker_makes_asynchrony_worth_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_main(["--step-seconds", "0.1", "0.1", "0.1", "0.4", "--workers", "4", "16"]) == 0

    said = capsys.readouterr().out
    assert "asynchrony gives 3." in said
    assert "Neither holder nor link is full with up to 16 workers." in said


def test_equal_workers_gain_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_main(["--step-seconds", "0.1", "--jitter", "0", "--workers", "4"]) == 0

    assert "equally fast" in capsys.readouterr().out


def test_a_full_holder_is_told_to_average_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    plan_main(["--step-seconds", "0.1", "--workers", "16", "--gather-ms", "2", "--update-ms", "20"])

    said = capsys.readouterr().out
    assert "The holder is 100% busy: gradients_per_update=8 gives 3." in said
    assert "The holder is full with 16 workers" in said


def test_a_full_link_is_told_to_round(capsys: pytest.CaptureFixture[str]) -> None:
    plan_main(["--step-seconds", "0.1", "--workers", "16", "--parameters", "2e6", "--bandwidth-gbit", "1"])

    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r'give more gradients, (\d\.\d+) times with "bf16" and (\d\.\d+) times with "int8"', said)
    assert found is not None
    # The link has a half and a quarter of the bytes; then the holder and the workers' own steps are what is left.
    assert 1.5 < float(found[1]) < float(found[2]) < 4.0


def test_shards_relieve_a_full_holder_on_one_host_and_full_links_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--step-seconds", "0.5", "--workers", "16", "--parameters", "100e6", "--holder-shards", "4"]

    assert plan_main(arguments) == 0
    assert "Neither holder nor link is full" in capsys.readouterr().out
    assert plan_main([*arguments, "--bandwidth-gbit", "10"]) == 0
    said = capsys.readouterr().out
    assert "The busiest host's link is full with 16 workers" in said
    # That is refused beside them.
    assert "wire_dtype" not in said


def test_a_bound_that_makes_workers_wait_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    plan_main(["--step-seconds", "0.1", "0.1", "0.1", "0.4", "--workers", "4", "--max-staleness", "1"])

    said = capsys.readouterr().out
    assert "The bound of 1 makes workers wait" in said


def recorded(folder: Path, steps: list[list[float]]) -> Path:
    stats = RunStats(workers=len(steps))
    configuration = {"max_staleness": 8, "on_stale": "wait", "batches": "shared", "gradients_per_update": 1}
    record = RunRecord(
        "AsyncStrategy", len(steps), 1, True, "2026-01-01T00:00:00", (), configuration, stats.as_dict(), steps
    )
    record.write(folder / "async_run.json")
    return folder


def test_the_steps_of_a_recorded_run_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded(tmp_path, [[0.1, 0.2], [0.1, 0.2], [0.6, 0.6]])

    assert plan_main(["--run", str(run), "--workers", "3", "--output", str(tmp_path / "plan.svg")]) == 0

    said = capsys.readouterr().out
    assert "3 workers: 15" in said
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step-seconds", "0"], "positive number of seconds"),
        (["--step-seconds", "1", "--jitter", "-1"], "The spread of a lognormal step time"),
        (["--step-seconds", "1", "--bandwidth-gbit", "1"], "needs --parameters"),
        (["--step-seconds", "1", "--parameters", "1", "--bandwidth-gbit", "0"], "must be positive"),
        (["--step-seconds", "1", "--max-staleness", "much"], "--max-staleness must be"),
        (["--run", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_main(arguments) == 2

    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_run_without_steps_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_main(["--run", str(recorded(tmp_path, [[], []]))]) == 2

    assert "has no steps of rank 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--step-seconds", "1", "--workers", "0"],
        ["--step-seconds", "1", "--workers", "few"],
        ["--step-seconds", "1", "--workers", "2", "--output", "plan.jpg"],
    ],
)
def test_wrong_arguments_exit_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan_main(arguments)

    assert ended.value.code == 2
