"""What the benchmark of the strategy's cost times is there."""

from __future__ import annotations

from benchmarks.overhead import PARTS


def test_each_part_of_a_step_that_is_timed_is_a_method() -> None:
    assert [name for owner, name in PARTS.values() if not callable(getattr(owner, name, None))] == []
