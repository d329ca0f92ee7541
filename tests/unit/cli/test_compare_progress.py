"""Claims about what a comparison and the demo show while their runs are under way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_async.cli.compare.progress import RunsDisplay
from lightning_async.cli.compare.runner import Job, Outcome

FIRST, SECOND = (Job(name, [], Path(name), "", Path(name) / "record.json") for name in ("first [a]", "second"))


def show() -> None:
    with RunsDisplay(2, lambda job: "val/acc 0.9000") as display:
        display.started(FIRST)
        display.progressed(FIRST, {"evaluations": [{"epoch": 2.5}], "max_epochs": 10})
        display.waiting()
        display.ended(Outcome(FIRST, seconds=12.4))
        display.started(SECOND)
        display.progressed(SECOND, {"evaluations": [{"epoch": 3.0}], "max_epochs": -1})
        display.ended(Outcome(SECOND, "exit status 1: no", 3.0, 1))


def test_without_a_terminal_there_is_a_line_for_each_run_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    show()

    printed = capsys.readouterr()
    assert printed.out == "✓ first [a]: 12 s, val/acc 0.9000\n✗ second: exit status 1: no\n"
    assert printed.err == ""


def test_in_a_terminal_a_bar_says_how_far_each_run_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)

    show()

    shown = capsys.readouterr().err
    assert "first [a]: starts" in shown
    assert "first [a]: 2.5 of 10 epochs |" in shown
    assert "second: 3 epochs" in shown
    assert "runs: 1 of 2 |" in shown
