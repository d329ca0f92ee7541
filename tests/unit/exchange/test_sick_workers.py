"""A worker that computes too long, or sends nothing that is finite, ends the run by name, whoever serves it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from lightning_async.exchange.options import ExchangeOptions
from lightning_async.runtime.failure import WorkerFailedError
from tests.harness import eventually
from tests.unit.exchange.test_remote_service import amsgrad, running

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_in_one_step_for_too_long_is_named_before_it_pushes(rank: int) -> None:
    with running(amsgrad, "thread", step_timeout_s=0.2) as run:
        run.service.begin_epoch(range(4))
        run.service.open(4)
        run.engines[rank].worker.draw()
        run.engines[rank].worker.begin_batch(1)

        assert eventually(lambda: run.latch.failure is not None)

    assert run.latch.failure is not None
    assert run.latch.failure.rank == rank
    assert "computed one step for more than 0.2 s (step_timeout)" in run.latch.failure.reason


def test_ranks_that_wait_for_each_other_are_in_no_step() -> None:
    with running(amsgrad, "thread", step_timeout_s=0.3) as run:
        run.train(steps=4)

        assert run.latch.wait(1.2) is None


@pytest.mark.parametrize("holder", ["thread", "process"])
def test_a_rank_that_sends_nothing_finite_is_named(holder: str) -> None:
    with running(amsgrad, holder, max_rejected_in_a_row=2) as run:
        # The workers hear of it in one of their next steps, or do not come so far.
        with suppress(WorkerFailedError):
            run.train(steps=40, spoiled=tuple(range(1, 40, 2)))
        assert eventually(lambda: run.latch.failure is not None and run.stats.rejected)

    assert run.latch.failure is not None
    assert str(run.latch.failure).startswith(
        "rank 1 failed: 2 gradients in a row were not finite (NaN or infinity), and"
    )
    assert all(bool(parameter.isfinite().all()) for own in run.parameters for parameter in own)
    assert run.stats.rejected_by_rank[0] == 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("max_rejected_in_a_row", 0, "max_rejected_in_a_row must be an int of at least 1, not 0"),
        ("max_rejected_in_a_row", True, "max_rejected_in_a_row must be an int of at least 1, not True"),
        ("holder_threads", 0, 'holder_threads must be an int of at least 1 or "auto", not 0'),
        ("holder_threads", True, 'holder_threads must be an int of at least 1 or "auto", not True'),
        ("reject_nonfinite", "yes", "reject_nonfinite must be one of False, True, not 'yes'"),
        ("step_timeout_s", 0, "step_timeout must be a positive number of seconds, or None for no limit, not 0"),
        ("step_timeout_s", torch.inf, "step_timeout must be a positive number"),
        ("max_slowdown", 1, "max_slowdown must be a number above 1, or None for no limit, not 1"),
    ],
)
def test_an_option_without_a_meaning_is_refused(option: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ExchangeOptions(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [{"holder_device": "cuda"}, {"transport": "nccl"}])
def test_threads_are_refused_where_the_holder_is_on_a_gpu(place: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="holder_threads=2 is for a holder on rank 0's host, and"):
        ExchangeOptions(holder_threads=2, **place)

    assert ExchangeOptions(holder_threads=1, **place).holder_threads == 1
