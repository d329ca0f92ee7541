"""What is measured of a fit: time without its pauses, losses as the module returned them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async.monitoring import stopwatch
from lightning_async.monitoring.recording import MeanLoss, returned_loss
from lightning_async.monitoring.stopwatch import Stopwatch


@given(steps=st.lists(st.tuples(st.sampled_from(["pause", "resume", "wait"]), st.integers(0, 9)), max_size=20))
def test_a_stopwatch_leaves_out_what_lies_between_pause_and_resume(steps: list[tuple[str, int]]) -> None:
    now, running, running_s, total_s = 100.0, True, 0.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopwatch.time, "perf_counter", lambda: now)
        clock = Stopwatch()
        for action, seconds in steps:
            if action != "wait":
                getattr(clock, action)()
                running = action == "resume"
            now += seconds
            total_s += seconds
            running_s += seconds * running
            assert (clock.running_s, clock.total_s) == (running_s, total_s)


@pytest.mark.parametrize(
    ("outputs", "accumulated", "expected"),
    [
        (torch.tensor(2.0), 1, 2.0),
        (torch.tensor([0.5]), 4, 2.0),
        ({"loss": torch.tensor(1.0, dtype=torch.bfloat16), "other": 1}, 2, 2.0),
        ({"other": torch.tensor(1.0)}, 1, None),
        (torch.ones(3), 1, None),
        (None, 1, None),
    ],
)
def test_a_loss_is_the_one_that_training_step_returned(outputs: Any, accumulated: int, expected: float | None) -> None:
    trainer: Any = SimpleNamespace(accumulate_grad_batches=accumulated)

    loss = returned_loss(trainer, outputs)

    assert (loss if loss is None else float(loss)) == expected


def test_losses_are_summed_up_without_changing_them_and_taken_once() -> None:
    losses, mean = [torch.tensor(1.0), torch.tensor(2.5)], MeanLoss()
    for loss in losses:
        mean.add(loss)

    assert mean.take() == (3.5, 2)
    assert mean.take() == (0.0, 0)
    assert [float(loss) for loss in losses] == [1.0, 2.5]
