"""Once a fence is closed nothing is begun inside it, and nothing is under way."""

from __future__ import annotations

import threading

import pytest

from lightning_async.exchange.fence import EvictedError, Fence
from tests.harness import Call

pytestmark = pytest.mark.timeout(30)


def test_closing_waits_for_the_step_under_way_and_lets_no_other_begin() -> None:
    fence = Fence(worker=2)
    inside, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def step() -> None:
        with fence:
            inside.set()
            go_on.wait(10.0)
            done.append("step")

    running = Call(step)
    assert inside.wait(10.0)
    closing = Call(lambda: (fence.close(), done.append("closed")))
    assert closing.waits()
    go_on.set()

    running.outcome()
    closing.outcome()
    assert done == ["step", "closed"]
    with pytest.raises(EvictedError, match=r"worker 2 \(incarnation 0\) was taken out of the run"):
        step()
    assert done == ["step", "closed"]


def test_a_closed_fence_can_be_closed_again_and_holds_nobody_up() -> None:
    fence = Fence(worker=1, incarnation=3)

    fence.close()
    fence.close()

    assert fence.closed
    for _ in range(2):
        with pytest.raises(EvictedError, match="incarnation 3"), fence:
            pass


def test_a_step_that_fails_lets_the_next_one_in() -> None:
    fence = Fence(worker=1)

    with pytest.raises(ValueError, match="no"), fence:
        raise ValueError("no")

    with fence:
        assert not fence.closed
