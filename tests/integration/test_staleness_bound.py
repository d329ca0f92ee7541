"""No applied gradient is staler than the bound, over ranks of very unlike speed; the statistics say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_async import AsyncAMSGradStrategy, RunStats
from tests.launch import launch, report
from tests.models import TinyClassifier, fork_trainer, loader
from tests.soaked import soaked

RANKS = 4
BATCHES = 120


def train_on_uneven_ranks(
    folder: Path, max_staleness: int | None, on_stale: Literal["wait", "drop"], **options: Any
) -> dict[str, Any]:
    """The statistics of two epochs, as the process that started the ranks has them afterwards."""

    def script(folder: Path) -> None:
        strategy = AsyncAMSGradStrategy(max_staleness, on_stale, start_method="fork", **options)
        trainer = fork_trainer(folder, RANKS, strategy, max_epochs=2)
        module = TinyClassifier(sleep_s=(0.001, 0.002, 0.004, 0.008))
        trainer.fit(module, loader(samples=BATCHES // 2, batch_size=1))
        assert isinstance(trainer.strategy.stats, RunStats)
        report(folder, 0, stats=trainer.strategy.stats.as_dict())

    run = launch(script, folder)
    assert run.returncode == 0, run.output
    stats: dict[str, Any] = run.report(0)["stats"]
    return stats


def assert_consistent(stats: dict[str, Any]) -> None:
    assert sum(stats["staleness"].values()) == stats["updates"] == sum(stats["updates_by_rank"].values())
    by_rank = {rank: sum(counts.values()) for rank, counts in stats["staleness_by_rank"].items()}
    assert by_rank == stats["updates_by_rank"]
    assert sum(stats["batches_by_rank"].values()) == stats["updates"] + stats["dropped"] == BATCHES
    for rank in range(RANKS):
        assert 0 <= stats["parked_seconds_by_rank"][rank] <= stats["wait_seconds_by_rank"][rank] + 1.0
    assert stats["rejected"] == 0
    assert stats["evicted"] == []


@pytest.mark.parametrize("max_staleness", soaked([0, 1, 3, 16, None], 1, 16))
def test_no_applied_gradient_is_staler_than_the_bound(tmp_path: Path, max_staleness: int | None) -> None:
    stats = train_on_uneven_ranks(tmp_path, max_staleness, "wait")

    assert_consistent(stats)
    assert stats["dropped"] == 0
    assert stats["updates"] == BATCHES
    if max_staleness is not None:
        assert max(stats["staleness"]) <= max_staleness
    if max_staleness != 0:
        assert max(stats["staleness"]) > 0


@pytest.mark.parametrize("max_staleness", soaked([1, 3], 3))
def test_no_applied_gradient_is_staler_than_the_bound_when_stale_ones_are_dropped(
    tmp_path: Path, max_staleness: int
) -> None:
    stats = train_on_uneven_ranks(tmp_path, max_staleness, "drop")

    assert_consistent(stats)
    assert max(stats["staleness"]) <= max_staleness
    # The slowest rank takes eight times as long as the fastest: by then some of its gradients are too old.
    assert 0 < stats["dropped"] < BATCHES


@pytest.mark.parametrize(("max_staleness", "transport"), [(7, "shm"), (9, "tcp"), (None, "shm")])
def test_no_applied_gradient_is_staler_than_the_bound_when_ranks_overlap(
    tmp_path: Path, max_staleness: int | None, transport: str
) -> None:
    stats = train_on_uneven_ranks(tmp_path, max_staleness, "wait", overlap=True, transport=transport)

    assert_consistent(stats)
    assert stats["updates"] == BATCHES
    # Each rank's own two gradients alone make one stale by one.
    assert 1 <= max(stats["staleness"]) <= (max_staleness or BATCHES)
