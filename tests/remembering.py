"""A classifier that remembers the parameters that it was trained and validated at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models import TinyClassifier

Make = Callable[[Any], torch.optim.Optimizer]


class Remembering(TinyClassifier):
    """Remembers the parameters that its steps see.

    Args:
        make: makes the optimizer.
        period: steps after which the learning rate is halved.
    """

    def __init__(self, make: Make, period: int) -> None:
        super().__init__()
        self.make = make
        self.period = period
        self.stepped_at: list[Tensor] = []
        self.validated_at: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.stepped_at.append(self.flat_parameters())
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated_at.append(self.flat_parameters())

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.period, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
