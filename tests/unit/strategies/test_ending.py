"""The end of a fit says where its report is; one that has failed already is not made worse."""

from __future__ import annotations

import logging

import pytest

from lightning_async.holder.types import Push, Update
from lightning_async.monitoring.stats import RunStats
from lightning_async.strategies.ending import do_each, print_end

CONFIGURATION = {"max_staleness": 4, "on_stale": "wait", "batches": "shared", "gradients_per_update": 1}


class Monitor:
    def __init__(self, line: str | None) -> None:
        self.line = line

    def break_off(self, error: BaseException) -> None:
        """Nothing."""

    def closing_line(self, broken_off: bool) -> str | None:
        return self.line


def stats(updates: int) -> RunStats:
    stats = RunStats(workers=2)
    for version in range(updates):
        push = Push(version % 2, 0, version_read=version, gradients=(), groups=())
        stats.record(Update(push, version + 1, staleness=0, applied=True, parked_s=0.0))
    return stats


@pytest.mark.parametrize(
    ("lines", "with_table", "updates", "last"),
    [
        ([], True, 9, "lightning_async.AsyncMonitor()"),
        ([], True, 0, None),
        ([], False, 9, None),
        (["the record is here"], True, 9, "the record is here"),
        (["the record is here"], False, 9, "the record is here"),
        (["the record is here", None], True, 9, "the record is here"),
    ],
)
def test_the_last_line_is_where_the_report_is_or_how_to_get_one(
    lines: list[str | None], with_table: bool, updates: int, last: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    print_end(CONFIGURATION, stats(updates), [Monitor(line) for line in lines], with_table)

    told = capsys.readouterr().out
    assert ("updates in" in told) == (with_table and updates > 0)
    assert told == "" if last is None else last in " ".join(told.splitlines()[-2:])


def test_a_step_that_fails_costs_neither_the_others_nor_the_error(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError("no space left")

    with caplog.at_level(logging.WARNING):
        do_each([lambda: done.append("one"), fail, lambda: done.append("two")])

    assert done == ["one", "two"]
    assert "no space left" in caplog.text
