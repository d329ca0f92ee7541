"""News of a lost rank break what waits for it, and nothing else."""

from __future__ import annotations

import threading

import pytest

from lightning_async.runtime import losses
from lightning_async.runtime.failure import RunFailure
from lightning_async.runtime.losses import Losses

KILLED = RunFailure(2, "its process was killed by SIGKILL")
CLOSED = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each time that this rank's process groups were broken."""
    broken: list[str] = []
    monkeypatch.setattr(losses, "break_groups", lambda: broken.append("broken"))
    return broken


@pytest.mark.parametrize(
    ("group", "breaks"), [(None, True), ((0, 1, 2), True), ((0, 1), False)], ids=["first", "with-it", "without-it"]
)
def test_news_of_a_loss_break_the_group_that_the_lost_rank_is_in_and_no_other(
    broken: list[str], group: tuple[int, ...] | None, breaks: bool
) -> None:
    """A group that was formed since would fail again and again for late news."""
    heard = Losses()
    if group is not None:
        heard.begin_group()
        heard.settle_group(group)

    heard.hear_of(KILLED)

    assert bool(broken) == breaks
    # While that group is formed it is broken again and again.
    assert heard.is_group_outdated() == breaks
    assert heard.last == KILLED


def test_who_was_lost_before_has_no_part_in_a_group_that_is_about_to_be_formed(broken: list[str]) -> None:
    heard = Losses()
    heard.hear_of(KILLED)

    heard.begin_group()

    assert not heard.is_group_outdated()


def test_who_is_lost_before_it_is_settled_who_is_in_a_group_may_be_one_of_them(broken: list[str]) -> None:
    heard = Losses()
    heard.begin_group()
    heard.hear_of(KILLED)
    assert heard.is_group_outdated()

    heard.settle_group((0, 1))

    assert not heard.is_group_outdated()


def test_an_error_comes_from_a_lost_rank_if_news_of_one_follow(broken: list[str]) -> None:
    heard = Losses()
    threading.Timer(0.2, heard.hear_of, (KILLED,)).start()

    assert heard.explain(CLOSED)
    assert not heard.explain(ValueError("no"))


def test_an_error_of_the_kind_without_news_is_none_of_a_lost_rank(
    broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_NEWS_TIMEOUT_S", 0.05)
    heard = Losses()
    heard.hear_of(KILLED)
    heard.begin_group()

    assert not heard.explain(CLOSED)
