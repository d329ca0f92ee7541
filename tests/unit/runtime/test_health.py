"""A worker is sick after so many rejected gradients in a row, and a run has diverged where most workers send such."""

from __future__ import annotations

from lightning_async.runtime.health import RejectionStreaks, Sick


def played(pushes: str, limit: int = 3) -> list[Sick]:
    """What comes of pushes: ``"0+"`` is a finite gradient of worker 0, ``"1-"`` a rejected one of worker 1."""
    streaks = RejectionStreaks(limit)
    noted = [streaks.note(int(push[0]), rejected=push[1] == "-") for push in pushes.split()]
    return [sick for sick in noted if sick is not None]


def test_a_finite_gradient_ends_a_streak() -> None:
    assert played("1- 1- 1+ 1- 1- 1+ 1- 1-") == []


def test_a_worker_that_alone_is_rejected_is_the_one_that_is_sick() -> None:
    (sick,) = played("0+ 2+ 1- 0+ 1- 2- 2+ 1- 1- 1-")

    assert (sick.worker, sick.everyone) == (1, False)
    assert "the last ones of other ranks were finite" in sick.reason


def test_where_most_workers_are_rejected_training_has_diverged() -> None:
    (sick,) = played("0+ 1+ 2+ 0- 1- 2- 1- 1-")

    assert sick.everyone
    assert sick.reason.startswith("training has diverged: 3 gradients in a row were not finite (NaN or infinity), nor")


def test_a_single_worker_is_told_what_helps() -> None:
    (sick,) = played("0- 0- 0-")

    assert "Lower the learning rate" in sick.reason


def test_a_worker_that_has_left_counts_no_more() -> None:
    streaks = RejectionStreaks(limit=2)
    streaks.note(0, rejected=True)
    streaks.forget(0)

    assert streaks.note(0, rejected=True) is None
