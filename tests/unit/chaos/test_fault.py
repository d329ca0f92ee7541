"""Faults as data strike at the passage that they name, and nowhere else."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest

from lightning_async.chaos import Fault, InjectedError
from lightning_async.chaos.fault import Counter


def test_a_fault_strikes_at_its_step_alone(capsys: pytest.CaptureFixture[str]) -> None:
    passages = Counter([Fault(2, 1, "raise", "draw")])

    passages.pass_by()
    with pytest.raises(InjectedError, match="injected into draw"):
        passages.pass_by()
    passages.pass_by()

    assert capsys.readouterr().err == "[rank 2] lightning_async: fault: raise at draw 1\n"


def test_a_fault_is_data() -> None:
    fault = Fault(3, 7, "stop", "mid-pull", 0.5, 2)

    assert Fault(**json.loads(json.dumps(asdict(fault)))) == fault


@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 0, "incarnation": -1}])
def test_a_fault_that_could_never_strike_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        Fault(rank=1, kind="kill", **wrong)


def test_a_paused_process_goes_on() -> None:
    if (pid := os.fork()) == 0:
        Fault(1, 0, "pause", after_s=0.1).strike()
        os._exit(7)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
