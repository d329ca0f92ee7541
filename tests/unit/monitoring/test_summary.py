"""The table at the end of a fit shows whole numbers, however narrow the terminal."""

from __future__ import annotations

import re

import pytest

from lightning_async.monitoring.summary import summary_table

UPDATES = {0: 123_456, 1: 120_000, 2: 31_207}
STATS = {
    "updates": sum(UPDATES.values()),
    "train_seconds": 100.0,
    "updates_by_rank": UPDATES,
    "batches_by_rank": UPDATES,
    "wait_seconds_by_rank": {0: 7.0, 1: 8.0, 2: 9.0},
    "median_step_seconds_by_rank": {0: 0.0393, 1: 0.0, 2: 0.129},
    "staleness": {0: 10, 3: 100, 12: 5},
    "staleness_by_rank": {0: {3: 4}, 1: {3: 4}, 2: {}},
    "rejected": 0,
    "rejected_by_rank": {0: 0, 1: 0, 2: 0},
}


def printed(width: int) -> list[str]:
    return summary_table(STATS, "The barrier cost nothing.", width).splitlines()


def table(lines: list[str]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells."""
    first, _second, *rows = (re.split(r"\s*│\s*", line)[1:-1] for line in lines if line.startswith("│"))
    return first, rows


def test_the_table_has_a_row_for_each_rank_and_one_for_all() -> None:
    headings, rows = table(printed(80))

    assert headings == ["rank", "updates", "share", "batches", "median step", "waiting", "staleness"]
    assert rows == [
        ["0", "123456", "45%", "123456", "39.3 ms", "7%", "3.0 / 3 / 3"],
        ["1", "120000", "44%", "120000", "-", "8%", "3.0 / 3 / 3"],
        ["2", "31207", "11%", "31207", "129.0 ms", "9%", "-"],
        ["all", "274663", "100%", "274663", "", "8%", "3.1 / 3 / 12"],
    ]


def test_rejected_gradients_have_a_column_where_there_is_room_and_are_some() -> None:
    stats = STATS | {"rejected": 7, "rejected_by_rank": {0: 0, 1: 7, 2: 0}}

    headings, rows = table(summary_table(stats, "", 100).splitlines())
    narrow, _ = table(summary_table(stats, "", 80).splitlines())

    assert [row[headings.index("rejected")] for row in rows] == ["0", "7", "0", "7"]
    assert narrow == ["rank", "updates", "share", "batches", "median step", "waiting", "staleness"]


@pytest.mark.parametrize("width", [120, 80, 79, 70, 60, 50, 40])
def test_a_narrow_terminal_has_fewer_columns_and_whole_numbers(width: int) -> None:
    lines = printed(width)

    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    _, rows = table(lines)
    assert [row[1] for row in rows] == [str(own) for own in [*UPDATES.values(), STATS["updates"]]]
    assert rows[-1][-1] == "3.1 / 3 / 12"
    assert "274663 updates in 100.0 s of training: 2746.6 a second" in " ".join(lines)


def test_where_several_gradients_make_an_update_gradients_are_counted() -> None:
    title, *lines = summary_table(STATS, "", 120, gradients_per_update=2).splitlines()

    assert title == "274663 gradients, 2 an update, in 100.0 s of training: 2746.6 a second"
    assert table(lines)[0][1] == "gradients"
