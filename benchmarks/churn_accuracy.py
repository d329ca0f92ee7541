"""Accuracy on digits with ranks killed again and again, beside undisturbed runs with the same seeds.

Run ``python -m benchmarks.churn_accuracy``. LeNet-5 in four forked ranks that sleep 20 ms in each step; each rank but
for rank 0, and each replacement, is killed in its 40th to 100th batch. Every batch is applied exactly once in both, so
what could differ is the order in which they are, and how stale.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import time
import warnings
from statistics import mean, stdev
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

import lightning_async
from benchmarks.emulated import QUIET, hush_lightning
from benchmarks.record import save
from lightning_async.chaos import Fault, FaultInjector
from lightning_async.cli.demo.model import DigitClassifier
from lightning_async.runtime import restart_counts
from recipes.digits import DigitsDataModule

_RANKS = 4
_MOST_DEATHS = 200


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[dict[str, Any]]] = {"undisturbed": [], "churned": []}
    print("seed   undisturbed   churned   deaths")
    for seed in range(arguments.seeds):
        for name, runs in found.items():
            runs.append(measure(seed, arguments.epochs, churned=name == "churned"))
        calm, churned = (runs[-1] for runs in found.values())
        print(f"{seed:>4} {calm['accuracy']:>13.4f} {churned['accuracy']:>9.4f} {churned['deaths']:>8}", flush=True)
    for name, runs in found.items():
        accuracies = [run["accuracy"] for run in runs]
        spread = stdev(accuracies) if len(runs) > 1 else 0.0
        print(f"{name:<12} {mean(accuracies):.4f} ± {spread:.4f} ({min(accuracies):.4f} to {max(accuracies):.4f})")
    save("churn_accuracy", vars(arguments), found)


def measure(seed: int, epochs: int, churned: bool) -> dict[str, Any]:
    """One run in processes of its own: its accuracy after the last epoch, and how many ranks were lost."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_train, args=(queue, seed, epochs, churned))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the run of seed {seed} failed with exit code {process.exitcode}")
    return dict(queue.get())


class _Slowly(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(0.02)


def _train(queue: Any, seed: int, epochs: int, churned: bool) -> None:
    warnings.filterwarnings("ignore")
    hush_lightning()
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    seed_everything(seed)
    # It is for ranks that fail by themselves.
    restart_counts.back_off_s = lambda count: 0.0
    strategy = lightning_async.AsyncAMSGradStrategy(
        start_method="fork", on_worker_failure="continue", max_restarts=_MOST_DEATHS, summary=False
    )
    dice = random.Random(seed)
    faults = [
        Fault(rank, dice.randint(40, 100), "kill", incarnation=incarnation)
        for rank in range(1, _RANKS)
        for incarnation in range(_MOST_DEATHS)
    ]
    callbacks = [_Slowly(), *([FaultInjector(faults)] if churned else [])]
    arguments: dict[str, Any] = {**QUIET, "accelerator": "cpu", "devices": _RANKS, "max_epochs": epochs}
    trainer = Trainer(strategy=strategy, callbacks=callbacks, **arguments)
    trainer.fit(DigitClassifier(), DigitsDataModule(augment=True))
    stats = strategy.stats
    queue.put(
        {
            "accuracy": float(trainer.callback_metrics["val/acc"]),
            "deaths": len(stats.evicted),
            "updates": stats.updates,
        }
    )


if __name__ == "__main__":
    main()
