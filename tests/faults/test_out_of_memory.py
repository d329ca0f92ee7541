"""A rank that has no memory or no thread left ends the run all the same, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.injector import Fault
from tests.faults.runs import FORK, assert_ended_well, explanations, start
from tests.faults.train import Run

pytestmark = pytest.mark.timeout(120)

WORKER_TIMEOUT_S = 5.0
EXCHANGES: dict[str, dict[str, Any]] = {
    "shm": {"transport": "auto"},
    "tcp": {"transport": "tcp"},
    "process": {"holder": "process"},
}


def options(exchange: str) -> dict[str, Any]:
    return FORK | EXCHANGES[exchange] | {"worker_timeout": WORKER_TIMEOUT_S}


@pytest.mark.parametrize(
    ("exchange", "rank"),
    [
        *((exchange, rank) for exchange in ("shm", "tcp") for rank in (0, 2)),
        ("process", 0),
        pytest.param("process", 2, marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("place", ["training_step", pytest.param("validation_step", marks=pytest.mark.soak)])
def test_a_rank_without_memory_is_named_and_ends_everyone(tmp_path: Path, exchange: str, rank: int, place: str) -> None:
    run = start(Run((Fault(rank, 5, "exhaust", place),), strategy=options(exchange)), tmp_path, timeout_s=40)

    assert_ended_well(run)
    assert explanations(run.output)[-1].startswith(f"rank {rank} failed: MemoryError")


@pytest.mark.parametrize("exchange", ["shm", "tcp", pytest.param("process", marks=pytest.mark.soak)])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["raise", pytest.param("kill", marks=pytest.mark.soak)])
def test_a_failing_rank_is_named_where_no_thread_can_be_started(
    tmp_path: Path, exchange: str, rank: int, kind: Any
) -> None:
    """Neither in the rank that fails nor in rank 0."""
    faults = tuple(Fault(each, 5, "threadless") for each in {0, rank})
    run = start(Run((*faults, Fault(rank, 8, kind, after_s=0.3)), strategy=options(exchange)), tmp_path, timeout_s=40)

    assert_ended_well(run)
    reason = "InjectedError: injected" if kind == "raise" else "its process was killed by SIGKILL"
    assert explanations(run.output)[-1].startswith(f"rank {rank} failed: {reason}")
