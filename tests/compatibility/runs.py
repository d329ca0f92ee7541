"""Runs of real ranks at uneven speeds, and a record of what the holder applied in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import default_collate

from lightning_async import AsyncAMSGradStrategy
from lightning_async.holder.hyperparams import HyperparamLayout
from tests.launch import Launched, launch, report
from tests.models import TinyClassifier, fork_trainer, loader

__all__ = ["RANKS", "UNEVEN", "History", "Reporting", "fail", "train"]

RANKS = 3
UNEVEN = (0.001, 0.002, 0.004)


class History:
    """Keeps every update of the holder: who, when, with which hyperparameters, which gradient."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []

    def __call__(self, update: Any, tickets: tuple[int, ...]) -> None:
        push = update.push
        gradients = [None if gradient is None else gradient.clone() for gradient in push.gradients]
        self.updates.append(
            {
                "worker": push.worker,
                "optimizer": push.optimizer,
                "read": push.version_read,
                "version": update.version,
                "applied": update.applied,
                "hyperparams": push.groups,
                "gradients": gradients,
                "tickets": tickets,
            }
        )


class Reporting(TinyClassifier):
    """Every rank reports its end; rank 0 also reports what the holder applied, and its last state."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(sleep_s=UNEVEN, **arguments)

    def facts(self) -> dict[str, Any]:
        """What a subclass wants reported besides."""
        return {}

    def on_train_end(self) -> None:
        strategy: Any = self.trainer.strategy
        if not isinstance(strategy, AsyncAMSGradStrategy):
            return
        facts = self.facts()
        facts |= {"parameters": {name: value.detach().clone() for name, value in self.named_parameters()}}
        facts |= {"version": strategy.version, "step": self.trainer.global_step, "batches": self.batches}
        facts |= {"lrs": [[group["lr"] for group in optimizer.param_groups] for optimizer in self.trainer.optimizers]}
        if self.global_rank == 0:
            for update in strategy.observers[0].updates:
                layout = HyperparamLayout(strategy.optimizers[update["optimizer"]])
                # Groups that were added later come last.
                named = zip(layout._places, update["hyperparams"], strict=False)
                update["lrs"] = [value for (_, key, _), value in named if key == "lr"]
            snapshot = strategy.engine.snapshot()
            facts |= {"updates": strategy.observers[0].updates, "holder": snapshot.optimizer_states}
        report(Path.cwd(), self.global_rank, **facts)


def _collate(samples: list[Any]) -> Any:
    # The last rank comes late to a segment's first batch, when the others are some steps on.
    if dist.get_rank() == RANKS - 1:
        time.sleep(0.008)
    return default_collate(samples)


def train(
    folder: Path,
    make_module: Callable[[], Reporting],
    options: dict[str, Any] | None = None,
    samples: int = 96,
    validation_samples: int = 0,
    ckpt_path: Path | None = None,
    **arguments: Any,
) -> Launched:
    """Fits a module on `RANKS` forked ranks; fails unless all of them end well and with the same parameters.

    Args:
        folder: working directory.
        make_module: makes the module in the launched process.
        options: of the strategy.
        samples: of the train data; a batch has four.
        validation_samples: of the validation data.
        ckpt_path: a checkpoint to go on from.
        arguments: of the trainer.
    """

    def script(folder: Path) -> None:
        strategy = AsyncAMSGradStrategy(start_method="fork", **(options or {}))
        strategy.observers.append(History())
        validation = loader(validation_samples) if validation_samples else None
        fork_trainer(folder, RANKS, strategy, **arguments).fit(
            make_module(), loader(samples, collate_fn=_collate), validation, ckpt_path=ckpt_path
        )

    run = launch(script, folder)
    assert run.returncode == 0, run.output
    first, *others = run.reports()
    assert len(others) == RANKS - 1
    for other in others:
        assert (other["version"], other["step"]) == (first["version"], first["step"])
        unlike = [
            name for name, value in first["parameters"].items() if not torch.equal(value, other["parameters"][name])
        ]
        assert unlike == []
    return run


def fail(tmp_path: Path, module: TinyClassifier, strategy: Any = None) -> str:
    """The output of a fit that ends with an error, in time."""

    def script(folder: Path) -> None:
        chosen = strategy or AsyncAMSGradStrategy(start_method="fork")
        fork_trainer(folder, RANKS, chosen, max_epochs=2).fit(module, loader(96))

    run = launch(script, tmp_path)
    assert run.returncode == 1, run.output
    return " ".join(run.output.split())
