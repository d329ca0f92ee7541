"""Which processes of a command are struck, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_async.chaos import striker as striking
from lightning_async.chaos.command import chaos_main
from lightning_async.chaos.processes import RankProcess, find_ranks
from lightning_async.chaos.striker import Striker
from lightning_async.runtime.whereabouts import FOLDER, announce_rank, announce_training

_SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def sleepers() -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Three ranks of another launcher, by their environment."""
    started = {rank: subprocess.Popen(_SLEEP, env=os.environ | {"RANK": str(rank)}) for rank in range(3)}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def test_ranks_are_found_by_their_environment(tmp_path: Path, sleepers: dict[int, subprocess.Popen[bytes]]) -> None:
    found = find_ranks(os.getpid(), tmp_path)

    assert [(one.rank, one.pid) for one in found] == [(rank, process.pid) for rank, process in sleepers.items()]


def test_a_forked_rank_is_found_by_what_it_has_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    if (pid := os.fork()) == 0:
        announce_rank(4)
        time.sleep(60)
        os._exit(0)
    try:
        while not (found := find_ranks(os.getpid(), tmp_path)):
            time.sleep(0.01)
        assert [(one.rank, one.pid) for one in found] == [(4, pid)]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert find_ranks(os.getpid(), tmp_path) == []


def test_a_process_that_has_the_number_of_one_that_ended_is_left_alone() -> None:
    assert not RankProcess(1, os.getpid(), started=0).send(signal.SIGTERM)


class _Clock:
    """Time that passes while the striker waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end: float) -> None:
        self.now, self._end = 0.0, end
        monkeypatch.setattr(striking.time, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self._end


class _Target(RankProcess):
    def send(self, number: signal.Signals) -> bool:
        return True


def _strikes(monkeypatch: pytest.MonkeyPatch, folder: Path, **arguments: object) -> list[tuple[float, str, int]]:
    targets = [_Target(rank, 100 + rank, 0) for rank in range(4)]
    monkeypatch.setattr(striking, "find_ranks", lambda root, announced: targets)
    clock = _Clock(monkeypatch, end=55.0)
    striker = Striker(1, folder, 10.0, say=lambda line: None, **arguments)  # type: ignore[arg-type]
    striker.run(clock.wait)
    return [(strike.at_s, strike.kind, strike.rank) for strike in striker.strikes]


def test_a_rank_but_for_rank_0_is_struck_every_so_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    strikes = _strikes(monkeypatch, tmp_path, seed=3)

    assert [at for at, _, _ in strikes] == [10.0, 20.0, 30.0, 40.0, 50.0]
    assert 0 not in {rank for _, _, rank in strikes}
    assert strikes == _strikes(monkeypatch, tmp_path, seed=3)


def test_only_the_ranks_that_were_asked_for_are_struck(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {rank for _, _, rank in _strikes(monkeypatch, tmp_path, ranks=[0])} == {0}


def test_a_rank_that_was_stopped_is_not_struck_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    strikes = _strikes(monkeypatch, tmp_path, kinds=["stop"])

    assert sorted(rank for _, _, rank in strikes) == [1, 2, 3]


def test_nothing_is_struck_after_the_time_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(_strikes(monkeypatch, tmp_path, until_s=30.0)) == 3


def test_ranks_that_say_who_they_are_are_left_alone_until_they_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    announce_rank(1)
    assert _strikes(monkeypatch, tmp_path) == []

    announce_training()

    assert _strikes(monkeypatch, tmp_path) != []


def test_the_exit_status_is_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert chaos_main(["--", sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert chaos_main(["--", "sh", "-c", "kill -9 $$"]) == 137

    assert "[chaos] 0 strikes; the command exited with code 3 after " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "what is to be run? lightning-async chaos --every 10 -- python train.py"),
        (["--", "no-such-program"], "no-such-program cannot be run: No such file or directory"),
        (["--every", "0", "--", "true"], "'0' is no positive number of seconds"),
        (["--ranks", "3-1", "--", "true"], "'3-1' is no list of ranks such as 1-3 or 0,2"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        chaos_main(arguments)

    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err
