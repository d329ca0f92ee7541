"""Writing never takes more than its part of the time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_async.monitoring.pace import Pace


@given(takes=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=50))
def test_writing_takes_no_more_than_its_part_whatever_it_takes(takes: list[float]) -> None:
    pace, now, spent = Pace(every_s=5.0, part=0.005), 0.0, 0.0
    for took in takes:
        while not pace.due(now):
            now += 0.5
        # All that was spent before is paid for.
        assert spent <= 0.005 * now + 1e-9
        pace.wrote(now, took)
        spent += took
        now += took

    assert pace.spent_s == spent


def test_what_is_quick_is_written_every_few_seconds() -> None:
    pace, written = Pace(every_s=5.0), []
    for tick in range(60):
        if pace.due(float(tick)):
            pace.wrote(float(tick), took_s=0.001)
            written.append(tick)

    assert written == list(range(0, 60, 5))
