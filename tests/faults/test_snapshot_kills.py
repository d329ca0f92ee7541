"""Whenever its writer is killed, a snapshot can be read: the new one, or the one before."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async.strategies.snapshot_file import SnapshotFile


def forked(body: Callable[[], None]) -> int:
    """A process that runs ``body`` and nothing else; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def ends_with(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(number: int) -> dict[str, Any]:
    return {"number": number, "parameters": torch.full((300_000,), float(number)), "state": {"count": number}}


def number_in(path: Path) -> int:
    """Which snapshot is there, whole."""
    found = torch.load(path)
    number = int(found["number"])
    assert found["state"]["count"] == number
    assert bool((found["parameters"] == number).all())
    return number


@pytest.mark.parametrize(
    ("call", "calls", "left"),
    [("open", 0, 1), ("write", 0, 1), ("write", 3, 1), ("fsync", 0, 1), ("replace", 0, 1), ("fsync", 1, 2)],
)
def test_a_kill_at_a_step_of_a_write_leaves_the_old_snapshot_or_the_new(
    tmp_path: Path, call: str, calls: int, left: int
) -> None:
    path = tmp_path / "snapshot.ckpt"

    def body() -> None:
        file = SnapshotFile(path)
        file.write(content(1))
        before, made = getattr(os, call), 0

        def kill_or_call(*arguments: Any) -> Any:
            nonlocal made
            made += 1
            if made > calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(*arguments)

        setattr(os, call, kill_or_call)
        file.write(content(2))

    code = ends_with(forked(body))

    assert code == -signal.SIGKILL
    assert number_in(path) == left


def test_a_kill_at_a_random_moment_leaves_a_whole_snapshot(tmp_path: Path) -> None:
    path, moments = tmp_path / "snapshot.ckpt", random.Random(7)
    last = 0
    for _ in range(12):

        def body() -> None:
            file, number = SnapshotFile(path), last  # noqa: B023  # it is over before the next one
            file.take_over()
            while True:
                number += 1
                file.write(content(number))

        pid = forked(body)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert ends_with(pid) == -signal.SIGKILL
        found = number_in(path)
        assert found >= last
        last = found
    file = SnapshotFile(path)
    file.remove_leftovers()

    assert last > 0
    assert [found.name for found in tmp_path.iterdir()] == ["snapshot.ckpt"]


def test_where_the_system_refuses_more_the_snapshot_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.ckpt"
    SnapshotFile(path).write(content(1))

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
        try:
            SnapshotFile(path).write(content(2))
        except OSError:
            os._exit(3)

    code = ends_with(forked(body))

    assert code == 3
    assert number_in(path) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["snapshot.ckpt"]
