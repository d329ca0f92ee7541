"""A rank that sends gradients that are not finite is named, in few lines."""

from __future__ import annotations

from lightning_async.holder.types import Push, Update
from lightning_async.monitoring.rejections import RejectionNotices


def said(rank: int, count: int, batches: int = 1) -> list[str]:
    notices = RejectionNotices()
    push = Push(rank, 0, 7, (), (), (range(batches),))
    lines = [notices.line(Update(push, 7, 0, False, 0.0, rejected=True)) for _ in range(count)]
    return [line for line in lines if line is not None]


def test_the_first_the_tenth_and_the_hundredth_are_told() -> None:
    lines = said(rank=2, count=250)

    assert len(lines) == 3
    assert lines[0].startswith("a gradient of rank 2, computed at version 7, is not finite (NaN or infinity): it is ")
    assert "that makes 100 of this rank" in lines[2]


def test_all_batches_of_an_update_are_said_to_count_as_done() -> None:
    assert "its 4 batches count as done" in said(rank=0, count=1, batches=4)[0]


def test_an_applied_gradient_is_nothing_to_tell() -> None:
    push = Push(0, 0, 7, (), ())

    assert RejectionNotices().line(Update(push, 8, 0, True, 0.0)) is None
