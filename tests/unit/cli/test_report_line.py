"""Claims about the last line of a run: the report, however the run has ended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_async import AsyncAMSGradStrategy, AsyncMonitor
from lightning_async.cli.report_line import ReportAtTheEnd, add_monitor, report_line
from lightning_async.monitoring.record import RECORD_NAME


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.monitoring.report.write_report", lambda folder: folder / "report.html")


def trainer_in(folder: Path, **arguments: Any) -> Trainer:
    trainer = Trainer(
        strategy=AsyncAMSGradStrategy(),
        accelerator="cpu",
        devices=2,
        default_root_dir=folder,
        **{"logger": False, "enable_checkpointing": False, **arguments},
    )
    add_monitor(trainer)
    return trainer


def leave_record(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_NAME).write_text("{}")


@pytest.mark.parametrize("end", [None, SystemExit(0), SystemExit(1), SystemExit(130)])
def test_a_program_that_leaves_a_record_ends_with_its_report(
    end: BaseException | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: BaseException | None = None
    try:
        with ReportAtTheEnd() as report:
            report.expect(trainer_in(tmp_path))
            leave_record(tmp_path)
            if end is not None:
                raise end
    except SystemExit as error:
        raised = error

    assert raised is end
    assert capsys.readouterr().out == f"report: {tmp_path}/report.html\n"


def test_after_an_exception_the_report_comes_after_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: shown.append(capsys.readouterr().out))

    def program() -> None:
        with ReportAtTheEnd() as report:
            report.expect(trainer_in(tmp_path))
            leave_record(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        program()
    # As the interpreter does.
    sys.excepthook(raised.type, raised.value, raised.tb)

    assert shown == [""]
    assert capsys.readouterr().out == f"report: {tmp_path}/report.html\n"


def test_a_record_of_an_earlier_run_is_not_taken_for_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_record(tmp_path)

    with ReportAtTheEnd() as report:
        report.expect(trainer_in(tmp_path))

    assert capsys.readouterr().out == ""


def test_a_program_without_a_fit_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ReportAtTheEnd():
        print("done")

    assert capsys.readouterr().out == "done\n"


def test_the_record_is_looked_for_where_the_logger_or_the_monitor_puts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = CSVLogger(tmp_path, name="mine")
    own = AsyncMonitor(folder=tmp_path / "own")
    for trainer, folder in (
        (trainer_in(tmp_path, logger=logger), tmp_path / "mine" / "version_0"),
        (trainer_in(tmp_path, callbacks=[own]), tmp_path / "own"),
    ):
        with ReportAtTheEnd() as report:
            report.expect(trainer)
            leave_record(folder)

        assert capsys.readouterr().out == f"report: {folder}/report.html\n"


def test_without_matplotlib_the_line_names_the_command_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tmp_path / "a b"

    assert report_line(folder) == f"report: pip install matplotlib, then lightning-async report '{folder}'"


def test_a_report_under_the_working_directory_is_named_by_a_short_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert report_line(tmp_path / "runs" / "a") == "report: runs/a/report.html"


def test_a_report_that_cannot_be_written_does_not_make_a_failure_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr("lightning_async.monitoring.report.write_report", full)

    said = report_line(tmp_path)

    assert said == f"no report: OSError: no space left on device; try lightning-async report {tmp_path}"
