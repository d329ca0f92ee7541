"""What a holder's process leaves is waited for, read as it was, and belongs to one segment."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from lightning_async.exchange.last_state import LastState, LastStateFile
from tests.launch import ENVIRONMENT


def state(version: int, segment: str = "one") -> LastState:
    return LastState(
        segment=segment,
        version=version,
        parameters=[[torch.ones(2)], []],
        optimizer_states=[{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        adapted=[[{"lr": 0.1}]],
        applied=((0, 4), (6, 7)),
        counts=(3, 4),
        gathered=None,
        policy={},
    )


def test_what_is_left_comes_back(tmp_path: Path) -> None:
    file = LastStateFile(tmp_path / "folder" / "snapshot.ckpt")
    assert file.read("one") is None
    file.write([state(1)])
    file.write([state(2), state(3, "another")])

    found = file.read("one")
    assert found is not None
    assert torch.equal(found.parameters[0][0], torch.ones(2))
    assert (found.segment, found.version, found.applied, found.counts) == ("one", 2, ((0, 4), (6, 7)), (3, 4))
    assert (file.read("another") or found).version == 3
    assert file.read("a third") is None
    file.remove()
    file.remove()
    assert file.read("one") is None


def test_a_parameter_does_not_take_the_buffer_that_it_is_in_along(tmp_path: Path) -> None:
    file, flat = LastStateFile(tmp_path / "snapshot.ckpt"), torch.zeros(1_000_000)
    file.write([replace(state(1), parameters=[[flat[:2], flat[2:3]]])])

    assert file.path.stat().st_size < 10_000


def test_a_start_waits_for_the_process_of_the_one_before(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot.ckpt"
    code = (
        "import sys, time; from pathlib import Path; from lightning_async.exchange.last_state import LastStateFile\n"
        "file = LastStateFile(Path(sys.argv[1])); file.claim(); file.claim(); print('claimed', flush=True)\n"
        "sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(snapshot)], env=os.environ | ENVIRONMENT, **pipes
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"claimed\n"
        file = LastStateFile(snapshot)
        assert not file.wait(0.05)
        process.kill()
        process.wait()
        assert file.wait(10.0)

    # Nothing is left, and nothing to wait for.
    assert [*tmp_path.iterdir()] == []
    assert file.wait(0.0)


def test_a_fit_that_ends_leaves_nothing(tmp_path: Path) -> None:
    file = LastStateFile(tmp_path / "snapshot.ckpt")
    file.claim()
    assert not LastStateFile(tmp_path / "snapshot.ckpt").wait(0.0)
    file.release()
    file.release()

    assert [*tmp_path.iterdir()] == []
