"""What two lanes per rank need, said before anything is exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_async import AMSGrad
from lightning_async.engine import Engine
from lightning_async.failure import FailureLatch
from lightning_async.monitor import RunStats
from lightning_async.options import ExchangeOptions


def build(optimizers: int = 1, **options: Any) -> Engine:
    return Engine(
        rank=0,
        world_size=4,
        optimizers=[AMSGrad([torch.nn.Parameter(torch.zeros(2))]) for _ in range(optimizers)],
        options=ExchangeOptions(overlap=True, **options),
        latch=FailureLatch(),
        address=None,
        door=None,
        stats=RunStats(4),
        observers=[],
        version=0,
        meet=lambda: None,
    )


def test_overlap_needs_room_for_two_gradients_of_each_rank() -> None:
    with pytest.raises(ValueError, match=r"8 in all, and max_staleness=6 .* at least 7"):
        build(max_staleness=6)


def test_overlap_takes_one_optimizer() -> None:
    with pytest.raises(ValueError, match="overlap=True takes one optimizer and there are 2"):
        build(optimizers=2)
