"""Ctrl+C is held back where it cannot be answered, and acted on where the main thread cannot hear it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_async.runtime.interrupts import ending_at_once, held_back, interruptible, leave_interrupted, let_through

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    # A shell's background job, which this may be, ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_process_started_meanwhile_hears_of_it_when_it_lets_it_through(tmp_path: Path) -> None:
    text = (
        "import sys; print('started', flush=True); sys.stdin.readline()\n"
        "from lightning_async.runtime.interrupts import let_through\n"
        "try:\n    let_through()\nexcept KeyboardInterrupt:\n    print('heard')\n"
    )
    with held_back():
        process = subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert process.stdout is not None and process.stdout.readline() == "started\n"

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate("\n", timeout=25)

    assert (output, process.returncode) == ("heard\n", 0)


def test_letting_through_what_was_never_pressed_does_nothing() -> None:
    let_through()


def test_a_call_that_does_not_return_for_a_signal_is_ended_by_another_thread() -> None:
    # A mutex, taken twice: the main thread never comes back from C.
    text = (
        "import ctypes, os\n"
        "from lightning_async.runtime.interrupts import interruptible\n"
        "lock = ctypes.CDLL(None).pthread_mutex_lock\n"
        "lock.argtypes = [ctypes.c_void_p]\n"
        "mutex = ctypes.create_string_buffer(64)\n"
        "with interruptible(lambda: os._exit(130), grace_s=0.1):\n"
        "    print('waits', flush=True)\n"
        "    lock(mutex)\n"
        "    lock(mutex)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"

    # By then it is in the call.
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=25)

    assert process.returncode == 130


def test_a_main_thread_that_hears_of_it_itself_is_left_alone() -> None:
    acted = threading.Event()

    with pytest.raises(KeyboardInterrupt), interruptible(acted.set, grace_s=20.0):
        press()

    assert not acted.is_set()
    assert "interrupts" not in {thread.name for thread in threading.enumerate()}


def test_without_ctrl_c_nothing_is_left_behind() -> None:
    with interruptible(lambda: None):
        pass

    assert signal.set_wakeup_fd(-1) == -1
    assert "interrupts" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("rank", "said"), [(None, "interrupted\n"), ("0", "interrupted\n"), ("1", "")])
def test_only_the_first_process_says_so(
    rank: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)

    with pytest.raises(SystemExit) as exit_info:
        leave_interrupted()

    assert exit_info.value.code == 130
    assert capsys.readouterr().err == said


def test_ctrl_c_while_processes_are_started_is_answered_when_all_of_them_are() -> None:
    started = []

    def hear() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.raise_signal(signal.SIGINT)

    def start() -> None:
        with held_back():
            # Another thread hears of it, and Python would raise in this one.
            hearing = threading.Thread(target=hear)
            hearing.start()
            hearing.join()
            started.append("the last")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started == ["the last"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_is_forked_meanwhile_answers_by_itself_again() -> None:
    with held_back():
        pid = os.fork()
        if pid == 0:
            try:
                let_through()
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10.0)
            except KeyboardInterrupt:
                os._exit(7)
            os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted\n"), ("1", "")])
def test_an_interrupt_that_other_code_would_swallow_ends_a_process_that_imports(rank: str, said: str) -> None:
    code = (
        "import signal\n"
        "from lightning_async.runtime.interrupts import ending_at_once\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with ending_at_once():\n"
        "    try:\n        signal.raise_signal(signal.SIGINT)\n    except KeyboardInterrupt:\n        pass\n"
        "print('goes on')\n"
    )
    environment = {**os.environ, "RANK": rank}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", said)


def test_after_the_imports_an_interrupt_is_raised_again() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ending_at_once():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        # A handler of somebody else's stays.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with ending_at_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
