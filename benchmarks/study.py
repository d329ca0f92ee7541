"""Asynchronous training beside tuned DDP, in virtual time: what can be taken over, and what it gains.

    python -m benchmarks.study                             # everything: two hours on two cores
    python -m benchmarks.study --problems digits --seeds 2
    python -m benchmarks.study --finished                  # tables and picture of what is finished

Four workers, one of them four times slower, and four equal ones; each step varies by 10 %. DDP and the asynchronous
settings train on the same grid of learning rates, with real gradients. Finished runs are kept in ``runs/study`` and not
done again. The table says for each setting the final metric at its best learning rate, and how long it takes to reach
what tuned DDP ends with (its mean less a standard deviation over the seeds), in parts of DDP's own time to it. DDP and
"auto" have five seeds, the other settings three.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import lightning_async
from benchmarks.emulated import QUIET, hush_lightning
from benchmarks.record import save
from lightning_async import SimulatedClusterStrategy
from recipes.classifier import Classifier
from recipes.datasets import (
    HelpTextDataModule,
    SyntheticImagesDataModule,
    SyntheticInteractionsDataModule,
    SyntheticSparseDataModule,
)
from recipes.digits import DigitsDataModule
from recipes.models import Factorization, LeNet5, ResNet18, SmallGPT, SparseLinear

OUT = Path("runs/study")
JITTER = 0.1
CLUSTERS: dict[str, list[float]] = {"straggler": [1.0, 1.0, 1.0, 4.0], "equal": [1.0] * 4}


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Args:
        make_model: the network.
        make_data: the data.
        metric: what is compared, higher is better with ``"max"``.
        mode: ``"max"`` or ``"min"``.
        epochs: of each run.
        rates: the grid of learning rates.
        checks: validations in an epoch.
        adamw: AdamW in place of AMSGrad.
        settings: of the classifier.
        seeds: as many as DDP and "auto" are trained with, from 1 on.
    """

    make_model: Callable[[], nn.Module]
    make_data: Callable[[], LightningDataModule]
    metric: str
    mode: str
    epochs: int
    rates: Sequence[float]
    checks: int = 1
    adamw: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 5


PROBLEMS: dict[str, Problem] = {
    "digits": Problem(
        LeNet5,
        partial(DigitsDataModule, batch_size=16, augment=True),
        "val/acc",
        "max",
        10,
        (0.002, 0.004, 0.008, 0.016),
        settings={"label_smoothing": 0.1},
    ),
    "logreg": Problem(
        partial(SparseLinear, init_std=0.0),
        partial(SyntheticSparseDataModule, batch_size=64),
        "val/loss",
        "min",
        6,
        (0.03, 0.06, 0.12, 0.24),
        checks=2,
        settings={"num_classes": 2, "task": "binary"},
    ),
    "factorization": Problem(
        Factorization,
        partial(SyntheticInteractionsDataModule, train_samples=60_000, batch_size=128),
        "val/loss",
        "min",
        4,
        (0.002, 0.004, 0.008, 0.016),
        checks=3,
        settings={"num_classes": 2, "task": "binary"},
    ),
    "gpt": Problem(
        partial(SmallGPT, block=32, width=48, layers=2, heads=3),
        partial(HelpTextDataModule, block=32, batch_size=16),
        "val/loss",
        "min",
        2,
        (0.0015, 0.003, 0.006),
        checks=6,
        adamw=True,
        settings={"num_classes": 96},
    ),
    "resnet18": Problem(
        partial(ResNet18, num_classes=10, width=8),
        partial(SyntheticImagesDataModule, train_samples=2_000, eval_samples=500, noise=3.0, batch_size=10),
        "val/acc",
        "max",
        5,
        (0.002, 0.004, 0.008),
        checks=2,
        seeds=3,
    ),
}

PAPER = "K=1, plain (the paper)"
# What each setting gives the strategy; beta1 is the optimizer's.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"gradients_per_update": 4, "max_staleness": 0},
    "ddp, beta1 0.5": {"gradients_per_update": 4, "max_staleness": 0, "beta1": 0.5},
    "auto": {"gradients_per_update": "auto"},
    "K=2, plain": {"gradients_per_update": 2},
    "K=4, look_ahead": {"gradients_per_update": 4, "staleness_policy": "look_ahead"},
    PAPER: {},
    "K=1, plain, beta1 0": {"beta1": 0.0},
}
# These have all of a problem's seeds, and are trained with equal workers, too, at DDP's best rate among the stragglers.
EQUAL = ("ddp", "auto")
OTHER_SEEDS = 3


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        problem: its name.
        cluster: its name.
        setting: its name.
        lr: learning rate.
        seed: of everything.
    """

    problem: str
    cluster: str
    setting: str
    lr: float
    seed: int

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        name = f"{self.problem}-{self.cluster}-{self.setting}-{self.lr}-{self.seed}".replace(" ", "_").replace("/", "_")
        return OUT / f"{name}.json"


class Decaying(Classifier):
    """Its learning rate falls to zero along a cosine, step by step."""

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        schedule = CosineAnnealingLR(optimizer, T_max=int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Curve(Callback):
    """The metric at each validation, over virtual time."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.points: list[tuple[float, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.points.append((strategy.virtual_seconds, float(trainer.callback_metrics[self.metric])))


def main() -> None:
    """Trains what has not been trained yet, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, help="number of seeds, from 1 on, in place of each problem's own")
    parser.add_argument("--finished", action="store_true", help="train nothing: leave out what is not finished")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--plot", type=Path, help="where to draw the metrics over virtual time")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    shown: dict[str, dict[str, float]] = {}
    for name in arguments.problems:
        problem, seeds = PROBLEMS[name], partial(seeds_of, name, asked=arguments.seeds)
        grid = [
            Run(name, "straggler", setting, lr, seed)
            for setting in SETTINGS
            for seed in seeds(setting)
            for lr in problem.rates
        ]
        if not arguments.finished:
            train_all(grid, arguments.processes)
        tuned = [setting for setting in SETTINGS if is_finished(run for run in grid if run.setting == setting)]
        best = {setting: best_rate(name, "straggler", setting, seeds(setting)) for setting in tuned}
        rate = best["ddp"]
        equal = [Run(name, "equal", setting, rate, seed) for setting in EQUAL for seed in seeds(setting)]
        if not arguments.finished:
            train_all(equal, arguments.processes)
        reference = (rate, seeds("ddp"))
        rows = [row(name, "straggler", setting, best[setting], seeds(setting), reference) for setting in tuned]
        taken_over = "auto, with DDP's own lr"
        if is_finished(Run(name, "straggler", "auto", rate, seed) for seed in seeds("auto")):
            rows += [row(name, "straggler", "auto", rate, seeds("auto"), reference, taken_over)]
        if is_finished(equal):
            rows += [
                row(name, "equal", setting, rate, seeds(setting), reference, f"equal workers: {setting}")
                for setting in EQUAL
            ]
        shown[name] = {"ddp": rate, "auto": rate} | {one: lr for one, lr in best.items() if one == PAPER}
        print(f"\n{name}: {problem.metric}, {problem.epochs} epochs")
        print("| setting | lr | final: mean ± sd | time to DDP's, of DDP's | reached | whole run, of DDP's |")
        print("|---|---:|---|---:|---:|---:|")
        for one in rows:
            print(
                f"| {one['setting']} | {one['lr']} | {one['mean']:.4f} ± {one['sd']:.4f} | {one['time']} "
                f"| {one['reached']} of {len(one['finals'])} | {one['whole']:.2f} |"
            )
        save(f"study_{name}", {**vars(arguments), "plot": None}, rows)
    if arguments.plot is not None:
        plot(shown, arguments.seeds, arguments.plot)


def seeds_of(problem: str, setting: str, asked: int | None) -> range:
    """The seeds of a setting: the problem's, or fewer of one that is there for comparison, or as many as asked for."""
    own = PROBLEMS[problem].seeds
    return range(1, (asked or (own if setting in EQUAL else min(own, OTHER_SEEDS))) + 1)


def is_finished(runs: Iterable[Run]) -> bool:
    """Whether all of them have a result."""
    return all(run.path.exists() for run in runs)


def plot(shown: dict[str, dict[str, float]], asked: int | None, path: Path) -> None:
    """Draws the mean over the seeds of each problem's metric, over virtual time."""
    figure = Figure(figsize=(9, 3.2 * math.ceil(len(shown) / 2)), layout="constrained")
    for place, (name, settings) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(math.ceil(len(shown) / 2), 2, place)
        for setting, lr in settings.items():
            seeds = seeds_of(name, setting, asked)
            curves = [_curve(Run(name, "straggler", setting, lr, seed)) for seed in seeds]
            times = [mean(at for at, _ in points) for points in zip(*curves, strict=True)]
            values = [mean(value for _, value in points) for points in zip(*curves, strict=True)]
            axes.plot(times, values, ".-", label=f"{setting}, lr {lr}")
        axes.set_title(name)
        axes.set_xlabel("virtual time, in steps of a fast worker")
        axes.set_ylabel(PROBLEMS[name].metric)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


def train_all(runs: Sequence[Run], processes: int) -> None:
    """Trains those that have no result yet."""
    missing = [run for run in runs if not run.path.exists()]
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=25) as pool:
        for _ in pool.imap_unordered(train, missing):
            pass


def train(run: Run) -> None:
    """Trains one, and writes its result."""
    warnings.filterwarnings("ignore")
    hush_lightning()
    torch.set_num_threads(1)
    problem, options = PROBLEMS[run.problem], dict(SETTINGS[run.setting])
    betas = (options.pop("beta1", 0.9), 0.999)
    seed_everything(run.seed, verbose=False)
    steps = [{"mean": step, "spread": JITTER, "distribution": "normal"} for step in CLUSTERS[run.cluster]]
    strategy = SimulatedClusterStrategy(steps, seed=run.seed, summary=False, **options)
    curve = Curve(problem.metric)
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=problem.epochs,
        val_check_interval=1.0 / problem.checks,
        callbacks=[curve],
        **QUIET,
        num_sanity_val_steps=0,
    )
    make_optimizer: Any = (
        partial(torch.optim.AdamW, lr=run.lr, betas=betas, weight_decay=0.1)
        if problem.adamw
        else partial(lightning_async.AMSGrad, lr=run.lr, betas=betas)
    )
    module = Decaying(problem.make_model(), optimizer=make_optimizer, **problem.settings)
    trainer.fit(module, problem.make_data())
    staleness = dict(sorted(strategy.stats.staleness.items()))
    result = {**asdict(run), "curve": curve.points, "staleness": staleness}
    run.path.write_text(json.dumps(result))


def finals(problem: str, cluster: str, setting: str, lr: float, seeds: Sequence[int]) -> list[float]:
    """The last metric of each seed."""
    return [_curve(Run(problem, cluster, setting, lr, seed))[-1][1] for seed in seeds]


def best_rate(problem: str, cluster: str, setting: str, seeds: Sequence[int]) -> float:
    """The learning rate with the best mean of the last metrics."""
    chosen = max if PROBLEMS[problem].mode == "max" else min
    return chosen(PROBLEMS[problem].rates, key=lambda lr: mean(finals(problem, cluster, setting, lr, seeds)))


def row(
    problem: str,
    cluster: str,
    setting: str,
    lr: float,
    seeds: Sequence[int],
    ddp: tuple[float, Sequence[int]],
    label: str | None = None,
) -> dict[str, Any]:
    """What a setting has come to, beside DDP in the same cluster with its best learning rate and its seeds."""
    sign, (ddp_lr, ddp_seeds) = 1.0 if PROBLEMS[problem].mode == "max" else -1.0, ddp
    theirs = [sign * value for value in finals(problem, cluster, "ddp", ddp_lr, ddp_seeds)]
    target = mean(theirs) - (stdev(theirs) if len(theirs) > 1 else 0.0)
    ours = finals(problem, cluster, setting, lr, seeds)
    mine = [_time_to(Run(problem, cluster, setting, lr, seed), sign, target) for seed in seeds]
    reference = [_time_to(Run(problem, cluster, "ddp", ddp_lr, seed), sign, target) for seed in ddp_seeds]
    reached = [value for value in mine if math.isfinite(value)]
    known = [value for value in reference if math.isfinite(value)]
    whole = [_curve(Run(problem, cluster, setting, lr, seed))[-1][0] for seed in seeds]
    ddp_whole = [_curve(Run(problem, cluster, "ddp", ddp_lr, seed))[-1][0] for seed in ddp_seeds]
    return {
        "setting": label or setting,
        "lr": lr,
        "finals": ours,
        "mean": mean(ours),
        "sd": stdev(ours) if len(ours) > 1 else 0.0,
        "time": f"{mean(reached) / mean(known):.2f}" if reached and known else "never",
        "reached": len(reached),
        "whole": mean(whole) / mean(ddp_whole),
    }


def _time_to(run: Run, sign: float, target: float) -> float:
    return next((at for at, value in _curve(run) if sign * value >= target), math.inf)


def _curve(run: Run) -> list[tuple[float, float]]:
    return [(at, value) for at, value in json.loads(run.path.read_text())["curve"]]


if __name__ == "__main__":
    main()
