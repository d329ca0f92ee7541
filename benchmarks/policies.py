"""What each staleness policy makes of delays up to 400, with three optimizers, in virtual time.

    python -m benchmarks.policies      # about ten minutes on two cores

LeNet-5 on digits. D + 1 equally fast workers whose steps vary by 10 % make gradients that are D updates old on average;
each gradient is an update. The data are gone through ten times in one epoch, since its end is a stop, where everything
arrives. Each optimizer has one learning rate, a small one; it falls along a cosine.
Finished runs are kept in ``runs/policies``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import ConcatDataset, DataLoader

import lightning_async
from benchmarks.emulated import QUIET, hush_lightning
from benchmarks.record import save
from benchmarks.study import Decaying
from lightning_async import SimulatedClusterStrategy
from recipes.digits import DigitsDataModule
from recipes.models import LeNet5

OUT = Path("runs/policies")
DELAYS = (0, 5, 20, 100, 400)
POLICIES = ("plain", "damping", "delay_adaptive", "ordered_momentum", "look_ahead")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AMSGrad": partial(lightning_async.AMSGrad, lr=0.0005),
    "Adam": partial(torch.optim.Adam, lr=0.0005),
    "SGD, momentum 0.9": partial(torch.optim.SGD, lr=0.005, momentum=0.9),
}


def main() -> None:
    """Trains what has not been trained yet, and prints a table for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=10, help="over the data")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 1 on")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    runs = [
        (optimizer, policy, delay, seed, arguments.passes)
        for seed in range(1, arguments.seeds + 1)
        for optimizer in OPTIMIZERS
        for delay in DELAYS
        for policy in POLICIES
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=25) as pool:
        results = dict(zip(runs, pool.map(train, runs, chunksize=1), strict=True))
    found = []
    for optimizer in OPTIMIZERS:
        print(f"\n{optimizer}\n\n| policy | " + " | ".join(f"D = {delay}" for delay in DELAYS) + " |")
        print("|---|" + "---:|" * len(DELAYS))
        for policy in POLICIES:
            cells = []
            for delay in DELAYS:
                accuracies = [
                    results[optimizer, policy, delay, seed, arguments.passes] for seed in range(1, arguments.seeds + 1)
                ]
                found.append({"optimizer": optimizer, "policy": policy, "delay": delay, "accuracies": accuracies})
                cells.append(f"{mean(accuracies):.3f}")
            print(f"| `{policy}` | " + " | ".join(cells) + " |", flush=True)
    save("policies", vars(arguments), found)


def train(run: tuple[str, str, int, int, int]) -> float:
    """Trains one; returns its last validation accuracy."""
    optimizer, policy, delay, seed, passes = run
    path = OUT / ("-".join(map(str, run)).replace(" ", "_").replace(",", "") + ".json")
    if path.exists():
        return float(json.loads(path.read_text()))
    warnings.filterwarnings("ignore")
    hush_lightning()
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    strategy: Any = SimulatedClusterStrategy(
        [{"mean": 1.0, "spread": 0.1, "distribution": "normal"}],
        workers=delay + 1,
        max_staleness=None,
        staleness_policy=policy,
        seed=seed,
        summary=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=1,
        **QUIET,
        num_sanity_val_steps=0,
    )
    module = Decaying(LeNet5(), optimizer=OPTIMIZERS[optimizer], label_smoothing=0.1)
    data = DigitsDataModule(batch_size=4, augment=True)
    data.setup("fit")
    repeated: Any = ConcatDataset([data.train_dataloader().dataset] * passes)
    trainer.fit(module, DataLoader(repeated, batch_size=4, shuffle=True), data.val_dataloader())
    accuracy = float(trainer.callback_metrics["val/acc"])
    path.write_text(json.dumps(accuracy))
    return accuracy


if __name__ == "__main__":
    main()
