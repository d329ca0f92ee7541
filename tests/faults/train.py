"""A training run with faults, described by data: called in a forked child, or run as a script of its own.

``python -m tests.faults.train '<json>'`` is what the script launcher and torchrun start once per rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.injector import Fault, FaultInjector
from tests.launch import ENVIRONMENT, run_as_script

__all__ = ["Run", "as_rank_0_of_a_script", "exec_script", "train"]


@dataclass(frozen=True)
class Run:
    """A run of a small module.

    Args:
        faults: what goes wrong.
        ranks: number of ranks.
        strategy: arguments of the strategy.
        trainer: arguments of the trainer.
        sleep_s: seconds that each rank sleeps in a training step.
        width: width of the hidden layer; large for payloads that take a while.
    """

    faults: tuple[Fault, ...] = ()
    ranks: int = 3
    strategy: dict[str, Any] = field(default_factory=lambda: {"start_method": "fork"})
    trainer: dict[str, Any] = field(default_factory=lambda: {"max_epochs": 200})
    sleep_s: tuple[float, ...] = (0.005, 0.005, 0.005)
    width: int = 8

    def as_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Inverse of `as_json`."""
        values = json.loads(text)
        faults = tuple(Fault(**fault) for fault in values.pop("faults"))
        return cls(faults=faults, **(values | {"sleep_s": tuple(values["sleep_s"])}))


def train(run: Run, folder: Path, callbacks: Sequence[Any] = ()) -> None:
    """Fits, and says so when it is done."""
    from torch import nn

    from lightning_async import AsyncAMSGradStrategy
    from tests.models import TinyClassifier, fork_trainer, loader

    module = TinyClassifier(sleep_s=run.sleep_s)
    module.net = nn.Sequential(nn.Linear(6, run.width), nn.ReLU(), nn.Linear(run.width, 2))
    trainer = fork_trainer(
        folder,
        run.ranks,
        AsyncAMSGradStrategy(**run.strategy),
        callbacks=[FaultInjector(run.faults), *callbacks],
        **run.trainer,
    )
    trainer.fit(module, loader(), loader(samples=24))


def as_rank_0_of_a_script(run: Run) -> None:
    """Trains in this process as a script's rank 0 does; Lightning starts the others, which run this module."""
    run_as_script(Path(__file__), run.as_json())


def exec_script(run: Run, *runner: str) -> None:
    """Becomes a Python interpreter that runs this module, by way of ``runner`` if given.

    Args:
        run: what it trains.
        runner: arguments for the interpreter that lead to the module, such as torchrun's.
    """
    arguments = [sys.executable, *runner, "-m", "tests.faults.train", run.as_json()]
    os.execve(sys.executable, arguments, os.environ | ENVIRONMENT)


if __name__ == "__main__":
    train(Run.from_json(sys.argv[1]), Path.cwd())
