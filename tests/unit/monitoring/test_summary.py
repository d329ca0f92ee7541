"""The table at the end of a fit shows whole numbers, however narrow the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

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
}


def printed(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_table(STATS, "The barrier cost nothing."))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_the_table_has_a_row_for_each_rank_and_one_for_all() -> None:
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in printed(80) if line.startswith("│")]

    assert rows == [
        ["0", "123456", "45%", "123456", "39.3 ms", "7%", "3.0 / 3 / 3"],
        ["1", "120000", "44%", "120000", "-", "8%", "3.0 / 3 / 3"],
        ["2", "31207", "11%", "31207", "129.0 ms", "9%", "-"],
        ["all", "274663", "100%", "274663", "", "8%", "3.1 / 3 / 12"],
    ]


@pytest.mark.parametrize("width", [120, 80, 79, 70, 60, 50, 40])
def test_a_narrow_terminal_has_fewer_columns_and_whole_numbers(width: int) -> None:
    lines = printed(width)

    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == len(UPDATES) + 1
    assert all(str(own) in row for own, row in zip([*UPDATES.values(), STATS["updates"]], rows, strict=True))
    assert "3.1 / 3 / 12" in rows[-1]
