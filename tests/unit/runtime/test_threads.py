"""What a session's thread does to the process around it."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch

from lightning_async.runtime.threads import SWITCH_INTERVAL_S, Errands, PromptSwitching, frame_of, use_one_thread


def test_the_limit_on_a_sessions_thread_leaves_the_training_thread_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []

    def session() -> None:
        use_one_thread()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=session)
    thread.start()
    thread.join()
    # A thread that torch has not met yet takes the process's number, as rank 0's may: the limit must not be in it.
    training = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    training.start()
    training.join()
    main = torch.get_num_threads()
    torch.set_num_threads(before)

    assert (seen, main) == ([1, 2], 2)


@pytest.mark.parametrize(("before", "meanwhile"), [(5e-3, SWITCH_INTERVAL_S), (1e-4, 1e-4)])
def test_serving_threads_get_the_interpreter_soon_and_leave_its_interval_as_it_was(
    before: float, meanwhile: float
) -> None:
    found = sys.getswitchinterval()
    sys.setswitchinterval(before)
    switching = PromptSwitching()
    try:
        switching.start()
        switching.start()
        during = sys.getswitchinterval()
        switching.stop()
        switching.stop()
        after = sys.getswitchinterval()
    finally:
        sys.setswitchinterval(found)

    assert (during, after) == pytest.approx((meanwhile, before))


def test_errands_are_run_in_turn_by_a_thread_that_was_there_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errands, done = Errands("errands"), threading.Event()
    errands.start()
    errands.start()
    ran: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def fail() -> None:
        raise OSError("no")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for errand in (lambda: ran.append("first"), fail, lambda: ran.append("second"), done.set):
        errands.run(errand)

    assert done.wait(5.0)
    assert ran == ["first", "second"]
    assert "an errand of errands failed" in caplog.text
    errands.close(5.0)
    errands.close(5.0)
    assert "errands" not in {thread.name for thread in threading.enumerate()}


# --- where a thread is ------------------------------------------------------------------------------------------------


def test_a_thread_is_found_where_it_waits() -> None:
    def waits() -> None:
        is_over.wait(20)

    is_over = threading.Event()
    thread = threading.Thread(target=waits)
    thread.start()
    frame = frame_of(thread.ident)
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    is_over.set()
    thread.join()

    assert "waits" in names
    assert frame_of(thread.ident) is None
    assert gc.isenabled()


@pytest.mark.parametrize("collects", [True, False])
def test_no_collection_begins_in_a_look_at_the_threads(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    """Else a thread that starts another one meanwhile may stand still for good; see `frame_of`."""
    seen: list[bool] = []
    monkeypatch.setattr(sys, "_current_frames", lambda: seen.append(gc.isenabled()) or {})
    if not collects:
        gc.disable()
    try:
        frame_of(1)
        after = gc.isenabled()
    finally:
        gc.enable()

    assert seen == [False]
    assert after == collects
