"""The holder's threads: all parts are done, once, whatever becomes of a thread; an error comes back."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.holder import blocks
from lightning_async.holder.blocks import UNIT, cut
from lightning_async.holder.team import Team
from tests.harness import eventually

pytestmark = pytest.mark.timeout(30)


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("holder-")]


@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=8), block=st.integers(1, 500))
def test_blocks_cover_every_element_once_and_cut_tensors_at_units_only(sizes: list[int], block: int) -> None:
    found = cut(sizes, block)

    covered = [
        (piece.tensor, element) for one in found for piece in one.pieces for element in range(piece.start, piece.stop)
    ]
    assert covered == [(tensor, element) for tensor, size in enumerate(sizes) for element in range(size)]
    assert [one.stop for one in found[:-1]] == [one.start for one in found[1:]]
    assert all(piece.start % UNIT == 0 for one in found for piece in one.pieces)
    assert all(one.stop - one.start == sum(piece.stop - piece.start for piece in one.pieces) for one in found)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_part_is_done_once_and_grad_mode_is_off_in_all_threads(threads: int) -> None:
    team, done = Team(threads), []
    gate = threading.Barrier(threads)

    def part(number: int) -> None:
        # Each thread is needed.
        gate.wait(10.0)
        done.append((number, threading.current_thread().name, torch.is_grad_enabled()))

    with torch.no_grad():
        team.run([lambda number=number: part(number) for number in range(threads)])  # type: ignore[misc]

    assert sorted(number for number, *_ in done) == list(range(threads))
    assert len({name for _, name, _ in done}) == threads
    assert not any(enabled for *_, enabled in done)
    team.close()
    assert eventually(lambda: not helpers())


def test_the_error_of_a_part_comes_when_no_other_is_under_way() -> None:
    team, started, done = Team(2), threading.Event(), []

    def fails() -> None:
        started.set()
        raise ZeroDivisionError("of a part")

    def lasts() -> None:
        started.wait(10.0)
        done.append(True)

    with pytest.raises(ZeroDivisionError, match="of a part"):
        team.run([fails, lasts])

    assert done == [True]
    # The team goes on.
    team.run([lambda: done.append(True), lambda: done.append(True)])
    assert len(done) == 3
    team.close()


def test_a_team_that_is_closed_or_forgotten_leaves_no_thread_and_still_works_without() -> None:
    team, done = Team(3), []
    team.run([lambda: None, lambda: None])
    assert eventually(lambda: len(helpers()) == 2)
    team.close()
    assert eventually(lambda: not helpers())
    team.run([lambda: done.append(1), lambda: done.append(2)])
    assert done == [1, 2]

    forgotten = Team(2)
    forgotten.run([lambda: None, lambda: None])
    del forgotten
    gc.collect()
    assert eventually(lambda: not helpers())


def test_a_process_that_may_have_no_more_threads_does_the_work_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    team, done = Team(4), []

    team.run([lambda: done.append(1), lambda: done.append(2)])

    assert (done, team.threads) == ([1, 2], 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_gone_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_async.holder.team._LOOK_S", 0.05)
    team, taken = Team(2), threading.Event()
    caller = threading.current_thread()

    class Ends(SystemExit):
        pass

    def vanish() -> None:
        taken.set()
        # As an interpreter that shuts down: the thread goes without a word.
        raise Ends

    monkeypatch.setattr("lightning_async.holder.team._do", _do_or_vanish(vanish, caller, taken))

    with pytest.raises(RuntimeError, match="the holder's thread holder-1 has ended in the middle of an update"):
        team.run([lambda: None, lambda: None])
    team.close()


def _do_or_vanish(vanish, caller, taken):  # type: ignore[no-untyped-def]
    def do(part, results):  # type: ignore[no-untyped-def]
        if threading.current_thread() is not caller:
            vanish()
        taken.wait(10.0)
        part()
        results.put(None)

    return do


@pytest.mark.parametrize("numel", [1, 63, 64, 1000])
def test_what_lies_in_a_row_is_gone_over_once(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGE", 1)
    team, counted = Team(3), torch.zeros(numel)

    team.over(numel, lambda part: counted[part].add_(1.0))

    assert counted.equal(torch.ones(numel))
    team.close()
