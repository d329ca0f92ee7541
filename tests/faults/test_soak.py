"""Runs with faults at random places train every batch exactly once; `make soak` makes many more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_async.chaos import Fault
from tests.faults.scenarios import Scenario
from tests.faults.soak import problems_of_deaths, run

pytestmark = pytest.mark.timeout(180)

_STRATEGY = {"start_method": "fork", "on_worker_failure": "continue", "max_restarts": 3, "summary": False}
_MID_PUSHES = Fault(1, 3, "kill", "mid-push"), Fault(2, 3, "kill", "mid-push"), Fault(1, 2, "kill", "handshake", 0.0, 1)
_MEETINGS = (
    Fault(1, 9, "kill", "met"),
    Fault(2, 1, "kill", "validation_step"),
    Fault(2, 4, "kill", "collective", 0.0, 1),
)


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(0, 3, _STRATEGY | {"transport": "tcp"}, 2, 36, 1.0, 0.005, _MID_PUSHES),
        Scenario(0, 3, _STRATEGY | {"transport": "shm", "batches": "sharded"}, 2, 36, 1.0, 0.005, _MEETINGS),
        Scenario.of(33),
    ],
    ids=["mid-push", "meetings", "seed 33"],
)
def test_every_batch_is_applied_once_whatever_is_killed(tmp_path: Path, scenario: Scenario) -> None:
    assert run(scenario, tmp_path) == []
    assert " lightning_async: fault: " in (tmp_path / "output.txt").read_text()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_deaths_and_joins_leave_nothing_in_rank_0(tmp_path: Path) -> None:
    assert problems_of_deaths(60, tmp_path) == []
