"""What is due is done by a thread that was there before."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest

from lightning_async.runtime import alarms
from lightning_async.runtime.alarms import Alarm

pytestmark = pytest.mark.timeout(20)


def alarm_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "alarms"]


def test_an_alarm_acts_once_and_again_when_it_is_set_again() -> None:
    acted = threading.Semaphore(0)
    alarm = Alarm(acted.release)

    for _ in range(2):
        alarm.set(0.01)
        assert acted.acquire(timeout=5.0)

    assert not acted.acquire(timeout=0.1)
    alarm.close()


def test_alarms_act_in_the_order_of_their_times() -> None:
    acted: list[str] = []
    done = threading.Event()
    late, early = Alarm(lambda: (acted.append("late"), done.set())), Alarm(lambda: acted.append("early"))

    late.set(0.2)
    early.set(0.02)

    assert done.wait(5.0)
    assert acted == ["early", "late"]
    late.close()
    early.close()


def test_a_closed_alarm_is_quiet_and_keeps_nothing() -> None:
    class Owner:
        def __init__(self) -> None:
            self.acted = threading.Event()
            self.alarm = Alarm(self.acted.set)

    owner = Owner()
    owner.alarm.set(0.1)
    owner.alarm.close()
    owner.alarm.close()
    acted, gone = owner.acted, weakref.ref(owner)

    del owner
    gc.collect()

    assert not acted.wait(0.3)
    assert gone() is None


def test_one_that_fails_keeps_the_others_from_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("no")

    done = threading.Event()
    failing, other = Alarm(fail), Alarm(done.set)
    failing.set(0.0)
    other.set(0.05)

    assert done.wait(5.0)
    assert "could not be done" in caplog.text
    failing.close()
    other.close()


def test_one_that_finds_no_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarms, "_BREATH_S", 0.01)
    tries: list[int] = []
    done = threading.Event()

    def act() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise MemoryError
        done.set()

    alarm = Alarm(act)
    alarm.set(0.0)

    assert done.wait(5.0)
    assert len(tries) == 3
    alarm.close()


def test_many_alarms_have_one_thread() -> None:
    many = [Alarm(lambda: None) for _ in range(20)]

    assert len(alarm_threads()) == 1
    for alarm in many:
        alarm.close()


def test_a_forked_process_has_alarms_of_its_own() -> None:
    Alarm(lambda: None).close()
    pid = os.fork()
    if pid == 0:
        Alarm(lambda: os._exit(7)).set(0.0)
        threading.Event().wait(10.0)
        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_an_alarm_that_sets_itself_acts_again() -> None:
    acted = threading.Semaphore(0)

    def act() -> None:
        acted.release()
        alarm.set(0.01)

    alarm = Alarm(act)
    alarm.set(0.01)

    assert all(acted.acquire(timeout=5.0) for _ in range(3))
    alarm.close()
