"""Large payloads take turns where one alone uses the link, and nobody waits for one that does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from lightning_async.transport.link_share import LinkShare
from tests.harness import Call

LARGE = 10 << 20


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def measured(share: LinkShare, clock: Clock, seconds: float = 1.0) -> None:
    """One payload has had the link for itself."""
    with share.turn(LARGE, 60.0) as moved:
        clock.now += seconds
        moved(LARGE)


def another(share: LinkShare, order: list[str], name: str = "second", longest_s: float = 60.0) -> Call:
    def go() -> None:
        with share.turn(LARGE, longest_s):
            order.append(name)

    return Call(go)


def begin(share: LinkShare) -> tuple[ExitStack, Callable[[int], None]]:
    stack = ExitStack()
    return stack, stack.enter_context(share.turn(LARGE, 60.0))


def test_a_payload_waits_for_one_that_uses_the_link(clock: Clock) -> None:
    share, order = LinkShare(clock), []
    measured(share, clock)
    first, moved = begin(share)
    clock.now += 0.5
    moved(LARGE // 2)

    second = another(share, order)
    assert second.waits()
    order.append("first")
    first.close()

    assert second.ended() is None
    assert order == ["first", "second"]


def test_nobody_waits_for_a_payload_whose_own_link_is_thinner(clock: Clock) -> None:
    share, order = LinkShare(clock), []
    measured(share, clock)
    slow, moved = begin(share)
    clock.now += 1.0
    moved(LARGE // 10)

    assert another(share, order).ended() is None
    assert order == ["second"]
    slow.close()


def test_a_payload_that_slows_down_is_no_longer_waited_for(clock: Clock) -> None:
    share, order = LinkShare(clock), []
    measured(share, clock)
    first, moved = begin(share)
    moved(LARGE // 2)
    clock.now += 0.5
    second = another(share, order)
    assert second.waits()

    clock.now += 5.0

    assert second.ended() is None
    first.close()


def test_a_turn_comes_after_the_longest_wait_whatever_the_others_do(clock: Clock) -> None:
    share, order = LinkShare(clock), []
    measured(share, clock)
    first, moved = begin(share)
    second = another(share, order, longest_s=2.0)
    assert second.waits()

    clock.now += 2.0
    moved(100 * LARGE)

    assert second.ended() is None
    first.close()


def test_turns_come_in_the_order_of_asking(clock: Clock) -> None:
    share, order = LinkShare(clock), []
    first, _ = begin(share)
    waiting = []
    for name in "abcd":
        waiting.append(another(share, order, name))
        assert waiting[-1].waits()
    first.close()

    assert [one.ended() for one in waiting] == [None] * 4
    assert order == [*"abcd"]


def test_where_the_link_is_as_fast_as_memory_nobody_waits(clock: Clock) -> None:
    share, order = LinkShare(clock), []
    measured(share, clock, seconds=0.005)
    first, _ = begin(share)

    assert another(share, order).ended() is None
    first.close()


def test_small_payloads_never_wait(clock: Clock) -> None:
    share = LinkShare(clock)
    first, _ = begin(share)
    passed = threading.Event()

    with share.turn(100_000, 60.0) as moved:
        moved(100_000)
        passed.set()

    assert passed.is_set()
    first.close()
